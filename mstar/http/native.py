"""`POST /generate`: everything that the engine can do, over a form."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request
from starlette.responses import Response

from mstar.http.body import read_form
from mstar.http.errors import told
from mstar.http.fields import Ask, ask_of, deadline
from mstar.http.front import Front, off_loop
from mstar.http.messages import with_media
from mstar.http.record import record_of
from mstar.http.running import running
from mstar.http.stream import streamed
from mstar.http.wire import document, error_line, lines, size_of
from mstar.types import Event, fold

__all__ = ["native_routes"]

NDJSON = "application/x-ndjson"
_STRING = {"type": "string"}
_SCHEMA = {
    "type": "object",
    "properties": {
        "text": {**_STRING, "description": "the prompt"},
        "files": {"type": "array", "items": {**_STRING, "format": "binary"}},
        "input_modalities": {**_STRING, "description": "comma list; the order of the parts"},
        "output_modalities": {**_STRING, "description": "comma list; the model's default"},
        "streaming": {"type": "boolean", "default": True},
        "model_kwargs": {**_STRING, "description": "JSON object with the model's parameters"},
        "request_id": {**_STRING, "description": "unique among the live requests"},
    },
}
_FORM = {"schema": _SCHEMA}
_CONTENT = {"multipart/form-data": _FORM, "application/x-www-form-urlencoded": _FORM}


def native_routes(front: Front) -> APIRouter:
    """The native route."""
    router = APIRouter()

    @router.post("/generate", openapi_extra={"requestBody": {"content": _CONTENT}})
    async def generate(request: Request) -> Response:
        """Run one request; stream its events as NDJSON, or answer with one JSON document."""
        front.check_open()
        parts = await read_form(front, request)
        files, size = any(p.name == "files" for p in parts), sum(len(p.data) for p in parts)
        args = (front.card, front.settings, parts)
        ask = await off_loop(ask_of, *args, size=size, always=files)
        if ask.arguments.get("messages") is not None:
            ask.arguments["messages"] = await with_media(front, ask.arguments["messages"])
        header, asked = request.headers.get("x-request-timeout"), ask.arguments.get("timeout")
        ask.arguments["timeout"] = deadline(front.settings, header, asked)
        record_of(request.scope).note(streaming=ask.streaming)
        if ask.streaming:
            return await streamed(_lines(front, request, ask), NDJSON)
        return await _document(front, request, ask)

    return router


async def _lines(front: Front, request: Request, ask: Ask) -> AsyncGenerator[bytes, None]:
    begun = False
    try:
        async with running(front, request, ask.arguments) as run:
            async for events in run.batches():
                begun = True
                args = (events, run.request_id, ask.names)
                yield await off_loop(lines, *args, size=size_of(events))
    except Exception as error:
        if not begun:
            raise
        yield error_line(told(error, request.scope))


async def _document(front: Front, request: Request, ask: Ask) -> Response:
    events: list[Event] = []
    async with running(front, request, ask.arguments) as run:
        async for batch in run.batches():
            events += batch
        request_id = run.request_id
    size = size_of(events)
    result = await off_loop(fold, events, request_id, size=size)
    body = await off_loop(document, result, ask.names, size=size)
    return Response(body, media_type="application/json")
