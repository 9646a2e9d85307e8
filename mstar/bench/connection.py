"""HTTP connections that know when each byte arrived.

With many streams on one event loop a piece of a body may wait while other streams are parsed. So
the time is taken in the callback of the socket, before anything else is done with the bytes, and
travels with them through httpcore.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpcore

from mstar.bench.trace import Trace

__all__ = ["Answer", "Connections"]

_IDLE = 2.0  # seconds; servers close idle connections after 5 or so


class Connections:
    """To one server: as many as there are requests at a time, used again; an async context.

    httpcore's own pool looks through all connections for each request, which at some hundred of
    them takes longer than what is to be measured.

    Args:
        base: the address that paths are put behind.
        headers: of every request.
    """

    def __init__(self, base: str, headers: dict[str, str]) -> None:
        self.base = base
        self._origin = httpcore.URL(base).origin
        self._headers = _encoded(headers)
        secure = base.startswith("https://")
        self._ssl = httpcore.default_ssl_context() if secure else None
        self._idle: list[httpcore.AsyncHTTPConnection] = []

    async def __aenter__(self) -> Connections:
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._idle:
            await self._idle.pop().aclose()

    @asynccontextmanager
    async def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        trace: Trace | None = None,
    ) -> AsyncIterator[Answer]:
        """Send a request; leaving early closes the connection. `trace` gets `sent`, `connect`."""
        connection = await self._free()
        request = connection.stream(
            method,
            self.base + path,
            headers=[*self._headers, *_encoded(headers or {})],
            content=body or None,
            extensions={} if trace is None else {"trace": _Watch(trace)},
        )
        try:
            async with request as response:
                told = {name.decode().lower(): value.decode() for name, value in response.headers}
                yield Answer(response.status, told, response)
        finally:
            if connection.is_idle() and not connection.is_closed():
                self._idle.append(connection)
            else:
                await connection.aclose()

    async def _free(self) -> httpcore.AsyncHTTPConnection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.has_expired():
                return connection
            await connection.aclose()
        return httpcore.AsyncHTTPConnection(
            self._origin,
            ssl_context=self._ssl,
            keepalive_expiry=_IDLE,
            network_backend=_Backend(),
        )


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


@dataclass
class Answer:
    """Status and headers (lower case) of a reply; iterate for the times and pieces of its body."""

    status: int
    headers: dict[str, str]
    _response: httpcore.Response

    async def __aiter__(self) -> AsyncIterator[tuple[float, bytes]]:
        stream = self._response.extensions["network_stream"]
        async for piece in self._response.aiter_stream():
            yield stream.at, piece

    @property
    def at(self) -> float:
        """When the last bytes came."""
        return self._response.extensions["network_stream"].at

    async def read(self, limit: int = 1 << 16) -> bytes:
        """The start of the body, for messages."""
        parts, size = [], 0
        async for piece in self._response.aiter_stream():
            parts.append(piece)
            size += len(piece)
            if size > limit:
                break
        return b"".join(parts)


class _Watch:
    """Notes when the connection was made and when the request went out."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._began = 0.0

    async def __call__(self, name: str, info: dict[str, Any]) -> None:
        if name == "http11.send_request_headers.started":
            self._trace.sent = time.perf_counter()
            if self._began:
                self._trace.connect = self._trace.sent - self._began
        elif name == "connection.connect_tcp.started":
            self._began = time.perf_counter()


class _Inbox(asyncio.Protocol):
    """What came from a socket, with the times."""

    def __init__(self) -> None:
        self.pieces: deque[tuple[float, bytes]] = deque()
        self.lost: Exception | None = None
        self.over = False
        self.writable = asyncio.Event()
        self.writable.set()
        self._reader: asyncio.Future[None] | None = None

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))
        self._wake()

    def eof_received(self) -> None:
        self.over = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost, self.over = exc, True
        self.writable.set()
        self._wake()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    async def some(self) -> tuple[float, bytes]:
        """The next piece; an empty one at the end."""
        while not self.pieces and not self.over:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self.pieces:
            return self.pieces.popleft()
        if self.lost is not None:
            raise httpcore.ReadError(str(self.lost)) from self.lost
        return time.perf_counter(), b""

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class _Stream(httpcore.AsyncNetworkStream):
    """A socket; `at` is when the bytes came that were read last."""

    def __init__(self, transport: asyncio.Transport, inbox: _Inbox) -> None:
        self._transport, self._inbox = transport, inbox
        self.at = 0.0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self.at, data = await self._inbox.some()
        if len(data) > max_bytes:
            self._inbox.pieces.appendleft((self.at, data[max_bytes:]))
            data = data[:max_bytes]
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._transport.is_closing():
            raise httpcore.WriteError("the server closed the connection")
        if buffer:
            self._transport.write(buffer)
            await self._inbox.writable.wait()

    async def aclose(self) -> None:
        self._transport.abort()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            transport = await loop.start_tls(
                self._transport, self._inbox, ssl_context, server_hostname=server_hostname
            )
        except (OSError, ssl.SSLError) as error:
            raise httpcore.ConnectError(str(error)) from error
        return _Stream(transport, self._inbox)

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return self._inbox.over or bool(self._inbox.pieces)
        return self._transport.get_extra_info(info)


class _Backend(httpcore.AsyncNetworkBackend):
    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            transport, inbox = await loop.create_connection(_Inbox, host, port)
        except OSError as error:
            raise httpcore.ConnectError(_words(error)) from error
        return _Stream(transport, inbox)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _words(error: OSError) -> str:
    """What the system says, without Python's decoration."""
    text = error.strerror or str(error)
    if "Connect call failed" in text or isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return text
