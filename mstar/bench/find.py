"""Which route a server has, and what its model is called."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import httpcore

from mstar.bench.connection import Connections
from mstar.bench.routes.base import parsed
from mstar.bench.trace import Bad
from mstar.errors import EngineClosed, InvalidRequest, RequestFailed
from mstar.transport import refusal

__all__ = ["base_of", "find"]

_ASK_FOR = 10.0  # seconds
# An empty request is refused with 400 or 422 where the route exists.
_PROBES = (
    ("chat", "/v1/chat/completions"),
    ("speech", "/v1/audio/speech"),
    ("images", "/v1/images/generations"),
)
_ABSENT = (404, 405, 501)


def base_of(url: str) -> str:
    """The address without `/v1` and slashes at its end.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        known = False
    if not known or not url.isascii() or any(letter.isspace() for letter in url):
        raise InvalidRequest("URL", url, "must be like http://localhost:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


async def find(connections: Connections, route: str, model: str | None) -> tuple[str, str | None]:
    """The route to use and the model to ask for.

    Args:
        route: a name of `ROUTES`, or `auto`.
        model: as the user gave it, if they did.

    Raises:
        EngineClosed: the server cannot be reached.
        InvalidRequest: the server lists no model and the user named none.
        MStarError: the server refuses (a wrong key).
    """
    if route == "generate" or (route != "auto" and model is not None):
        return route, model
    names = await _models(connections)
    if route == "auto":
        route = "generate" if names is None else await _probed(connections)
    if model is None and route != "generate":
        if not names:
            raise InvalidRequest(
                "--model", None, f"{connections.base}/v1/models names none; say which"
            )
        model = names[0]
    return route, model


async def _models(connections: Connections) -> list[str] | None:
    """What `/v1/models` lists; None where there is no such page."""
    status, body = await _ask(connections, "GET", "/v1/models")
    if status in (401, 403):
        raise refusal("GET", f"{connections.base}/v1/models", status, {}, body)
    try:
        listed = parsed(body).get("data") if status == 200 else None
    except Bad:
        return None
    if not isinstance(listed, list):
        return None
    names = [item.get("id") for item in listed if isinstance(item, dict)]
    return [name for name in names if isinstance(name, str)]


async def _probed(connections: Connections) -> str:
    """The first route that the server has."""
    for route, path in _PROBES:
        status, _ = await _ask(connections, "POST", path, b"{}")
        if status not in _ABSENT:
            return route
    return "generate"


async def _ask(
    connections: Connections, method: str, path: str, body: bytes = b""
) -> tuple[int, bytes]:
    headers = {"content-type": "application/json"} if body else {}
    url = connections.base + path

    async def exchange() -> tuple[int, bytes]:
        async with connections.send(method, path, body, headers) as answer:
            return answer.status, await answer.read(1 << 20)

    try:
        return await asyncio.wait_for(exchange(), _ASK_FOR)
    except asyncio.TimeoutError:
        raise EngineClosed(f"{url} did not answer within {_ASK_FOR:g} s") from None
    except httpcore.ConnectError as error:
        raise EngineClosed(f"cannot reach {url}: {error}") from None
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise RequestFailed(f"the connection to {url} broke off: {error}") from None
