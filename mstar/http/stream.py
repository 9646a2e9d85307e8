"""An answer whose bytes are made while it is sent."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["StreamedResponse", "streamed"]


async def streamed(
    body: AsyncGenerator[bytes, None],
    media_type: str,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer that begins with the first piece of `body`; raises what goes wrong before it."""
    try:
        first = await anext(body)
    except StopAsyncIteration:
        first = b""
    except BaseException:
        await body.aclose()
        raise
    return StreamedResponse(first, body, media_type, headers)


class StreamedResponse(Response):
    """Each piece is sent as soon as it is made; the generator is closed in every outcome."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        media_type: str,
        headers: Mapping[str, str] | None,
    ) -> None:
        super().__init__(media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self.first, self.rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        start = {"type": "http.response.start", "status": self.status_code}
        try:
            await send({**start, "headers": self.raw_headers})
            await send(_piece(self.first))
            async for piece in self.rest:
                await send(_piece(piece))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self.rest.aclose()


def _piece(data: bytes) -> dict:
    return {"type": "http.response.body", "body": data, "more_body": True}
