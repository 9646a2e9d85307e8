"""An answer whose bytes are made while it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mstar.http.record import record_of

__all__ = ["StreamedResponse", "streamed"]

# Proxies are not to keep it, nor to collect it before they pass it on.
_AT_ONCE = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def streamed(body: AsyncGenerator[bytes, None], media_type: str) -> Response:
    """An answer that begins with the first piece of `body`; raises what goes wrong before it."""
    try:
        first = await anext(body)
    except StopAsyncIteration:
        first = b""
    except BaseException:
        await body.aclose()
        raise
    return StreamedResponse(first, body, media_type)


class StreamedResponse(Response):
    """Each piece is sent as soon as it is made; the generator is closed in every outcome."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        media_type: str,
    ) -> None:
        super().__init__(media_type=media_type, headers=_AT_ONCE)
        del self.headers["content-length"]
        self.first, self.rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it.

        In a task of its own: whatever resumes a coroutine passes through all frames that await it,
        and around a response there are two dozen of them.
        """
        try:
            start = {"type": "http.response.start", "status": self.status_code}
            await send({**start, "headers": self.raw_headers})
            await asyncio.ensure_future(self._send(record_of(scope).send))
        finally:
            await self.rest.aclose()

    async def _send(self, send: Send) -> None:
        kind = "http.response.body"
        await send({"type": kind, "body": self.first, "more_body": True})
        async for piece in self.rest:
            await send({"type": kind, "body": piece, "more_body": True})
        await send({"type": kind, "body": b"", "more_body": False})
