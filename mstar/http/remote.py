"""Media from other servers, fetched in a way that cannot be turned against our own network.

Only http and https; the name is resolved here, every address behind it must be public, and the
connection goes to just that address, so that a second answer of the name server changes nothing.
Redirects are followed by hand and checked in the same way. Proxies of the environment are not
used: they would resolve the name again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote, urljoin, urlsplit

import certifi

import mstar
from mstar.errors import InvalidRequest
from mstar.http.addresses import is_public
from mstar.http.allowance import Allowance

__all__ = ["fetch"]

_WORKERS = ThreadPoolExecutor(8, "mstar-fetch")  # they wait most of the time
_SECONDS = 20.0  # for one URL with all its redirects
_TO_CONNECT = 5.0  # seconds for one address
_ADDRESSES = 3  # of one name that are tried
_REDIRECTS = (301, 302, 303, 307, 308)
_HOPS = 5
_LONGEST_URL = 8192
_LONGEST_HOST = 253
_PIECE = 64 * 1024
_PATH_SAFE = "/%:=&?~+!$,;'@()*[]-._"


async def fetch(url: str, field: str, allowance: Allowance) -> bytes:
    """What lies at a URL.

    Args:
        url: http or https.
        field: to name in errors, which never hold anything that the other server says.
        allowance: what may be read.

    Raises:
        InvalidRequest: it cannot be had, is not public, too large or too slow.
    """
    seconds = min(allowance.begin(field), _SECONDS)
    download = _Download(url, field, allowance, time.monotonic() + seconds)
    running = asyncio.get_running_loop().run_in_executor(_WORKERS, download.run)
    try:
        return await asyncio.wait_for(running, seconds)
    except asyncio.TimeoutError:
        raise InvalidRequest(field, url[:80], "did not come in time") from None
    finally:
        download.abort()


@dataclass(frozen=True)
class _Target:
    """Where a URL leads."""

    tls: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of the header Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class _Download:
    """One URL; runs on a thread of its own and can be broken off from another."""

    def __init__(self, url: str, field: str, allowance: Allowance, end: float) -> None:
        self._url, self._field, self._allowance, self._end = url, field, allowance, end
        self._lock = threading.Lock()
        self._aborted = False
        self._wire: socket.socket | None = None  # a second handle of the socket in use

    def abort(self) -> None:
        """End it soon, whatever it waits for."""
        with self._lock:
            self._aborted = True
            if self._wire is not None:
                with contextlib.suppress(OSError):
                    self._wire.shutdown(socket.SHUT_RDWR)

    def run(self) -> bytes:
        """The body of the answer behind all redirects."""
        try:
            url = self._url
            for _ in range(_HOPS + 1):
                connection = self._ask(self._target(url))
                with contextlib.closing(connection):
                    response = connection.getresponse()
                    if response.status not in _REDIRECTS:
                        return self._body(response)
                    url = urljoin(url, response.headers.get("location", ""))
            self._refuse(f"redirects more than {_HOPS} times")
        except ssl.SSLCertVerificationError:
            self._refuse("the other server has no valid certificate")
        except TimeoutError:
            self._refuse("did not come in time")
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, InvalidRequest):
                raise
            self._refuse("the other server cannot be reached or breaks off")
        finally:
            self._watch(None)

    def _refuse(self, words: str) -> NoReturn:
        raise InvalidRequest(self._field, self._url[:80], words) from None

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0 or self._aborted:
            self._refuse("did not come in time")
        return left

    def _target(self, url: str) -> _Target:
        if len(url) > _LONGEST_URL or "\\" in url or any(c <= " " or c == "\x7f" for c in url):
            self._refuse("is not a URL")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            self._refuse("is not a URL")
        if parts.scheme not in ("http", "https"):
            self._refuse("redirects to what is neither http nor https")
        if "@" in parts.netloc:
            self._refuse("must not hold a user name")
        if not host or len(host) > _LONGEST_HOST or "%" in host or port == 0:
            self._refuse("names no host")
        tls = parts.scheme == "https"
        path = quote(parts.path or "/", safe=_PATH_SAFE)
        if parts.query:
            path += "?" + quote(parts.query, safe=_PATH_SAFE)
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError:
            self._refuse("names no host")
        return _Target(tls, host, port or (443 if tls else 80), path)

    def _ask(self, target: _Target) -> http.client.HTTPConnection:
        """A connection on which the request was sent."""
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.auto_open = 0
        connection.sock = self._dial(target)
        try:
            connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
            connection.putheader("Host", target.authority)
            connection.putheader("User-Agent", f"mstar/{mstar.__version__}")
            connection.putheader("Accept", "*/*")
            connection.putheader("Accept-Encoding", "identity")
            connection.putheader("Connection", "close")
            connection.endheaders()
        except BaseException:
            connection.close()
            raise
        return connection

    def _dial(self, target: _Target) -> socket.socket:
        """A connected socket, to an address that was checked."""
        self._left()
        try:
            found = resolve(target.host, target.port)
        except (OSError, UnicodeError):
            self._refuse("its host is not known")
        if not found or not all(is_public(info[4][0]) for info in found):
            self._refuse("its host is not at a public address")
        error: OSError | None = None
        for family, kind, proto, _, address in found[:_ADDRESSES]:
            wire = socket.socket(family, kind, proto)
            try:
                self._watch(wire)
                wire.settimeout(min(self._left(), _TO_CONNECT))
                wire.connect(address)
                wire.settimeout(self._left())
                if target.tls:
                    return tls_context().wrap_socket(wire, server_hostname=target.host)
                return wire
            except OSError as failed:
                wire.close()
                error = failed
            except BaseException:
                wire.close()
                raise
        raise error

    def _watch(self, wire: socket.socket | None) -> None:
        """This is the socket that `abort` has to wake."""
        with self._lock:
            if self._wire is not None:
                self._wire.close()
            self._wire = wire.dup() if wire is not None and not self._aborted else None

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != 200:
            self._refuse(f"the other server answers with status {response.status}")
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            self._refuse("the other server sends it compressed")
        if response.headers.get("transfer-encoding", "chunked").strip().lower() != "chunked":
            self._refuse("the other server sends it in an unknown coding")
        stated, pieces, size = response.length, [], 0
        if stated is not None and stated > self._allowance.left():
            self._refuse("has more bytes than this server takes")
        while piece := response.read(_PIECE):
            self._left()
            if not self._allowance.take(len(piece)):
                self._refuse("has more bytes than this server takes")
            pieces.append(piece)
            size += len(piece)
        if stated is not None and size != stated:
            self._refuse("the other server cannot be reached or breaks off")
        return b"".join(pieces)


def resolve(host: str, port: int) -> list[tuple[Any, ...]]:
    """The addresses of a host, as `socket.getaddrinfo` gives them."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


@functools.cache
def tls_context() -> ssl.SSLContext:
    """Checks certificates and host names, by the authorities of the system and of certifi."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context
