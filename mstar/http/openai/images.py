"""`POST /v1/images/generations` and `/v1/images/edits`: whole, as a stream, or kept under a URL."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from python_multipart.multipart import parse_options_header
from starlette.responses import Response

from mstar.errors import InvalidRequest, RequestFailed
from mstar.http.body import read_form, read_json
from mstar.http.errors import Refused
from mstar.http.front import Front, off_loop
from mstar.http.middleware import IMAGE_FILES
from mstar.http.openai.common import error_event, flat
from mstar.http.openai.image_store import ImageStore
from mstar.http.openai.images_ask import ImagesAsk, ask_of
from mstar.http.openai.images_form import read_edit_form
from mstar.http.openai.images_schema import EDIT, GENERATION
from mstar.http.openai.images_surface import ImagesSurface
from mstar.http.openai.images_uploads import from_json, uploads_of
from mstar.http.openai.images_wire import Drawn, Previews, completed, drawn, partial, reply
from mstar.http.record import record_of
from mstar.http.running import merged, running, running_all
from mstar.http.stream import streamed
from mstar.io.image import FORMATS
from mstar.types import ImageChunk, ProgressChunk, TextChunk, Usage

__all__ = ["images_routes"]

_SAID = 300  # characters shown of what a model says instead of drawing


def images_routes(
    front: Front, surface: ImagesSurface, store: ImageStore | None = None
) -> APIRouter:
    """The images routes of a model that draws, and the files that their URLs lead to."""
    router = APIRouter()
    store = ImageStore() if store is None else store

    async def ask(request: Request, fields: dict[str, Any], uploads: Any = None) -> ImagesAsk:
        header, size = request.headers.get("x-request-timeout"), record_of(request.scope).held
        return await off_loop(ask_of, front, surface, fields, uploads, header, size=size)

    @router.post("/v1/images/generations", openapi_extra={"requestBody": {"content": GENERATION}})
    async def generations(request: Request) -> Response:
        """Draw what `prompt` tells."""
        front.check_open()
        fields = await read_json(front, request)
        return await _answer(front, request, await ask(request, fields), "image_generation", store)

    if surface.edits:

        @router.post("/v1/images/edits", openapi_extra={"requestBody": {"content": EDIT}})
        async def edits(request: Request) -> Response:
            """Draw what `prompt` tells, beginning with the images that are sent along."""
            front.check_open()
            fields, images, masks = await _read_edit(front, request)
            uploads = await uploads_of(front, surface, images, masks)
            asked = await ask(request, fields, uploads)
            return await _answer(front, request, asked, "image_edit", store)

    @router.api_route(IMAGE_FILES + "{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(name: str) -> Response:
        """An image that was made with `response_format=url`."""
        data = store.get(name)
        if data is None:
            message = "no such image; it is gone an hour after it was made, or earlier"
            raise Refused(404, message, code="not_found")
        headers = {"cache-control": "private, max-age=3600", "x-content-type-options": "nosniff"}
        return Response(data, media_type=FORMATS[name.rpartition(".")[2]], headers=headers)

    return router


async def _read_edit(
    front: Front, request: Request
) -> tuple[dict[str, Any], list[bytes], list[bytes]]:
    """Fields, images and masks, from a form or from JSON."""
    kind, _ = parse_options_header(request.headers.get("content-type", ""))
    if kind == b"application/json":
        fields = flat(await read_json(front, request))
        return fields, *await from_json(front, fields)
    if kind not in (b"multipart/form-data", b"application/x-www-form-urlencoded"):
        given = kind.decode("latin-1") or "none"
        message = f"content-type: must be multipart/form-data or application/json, not {given}"
        raise Refused(400, message)
    parts = await read_form(front, request)
    size = sum(len(part.data) for part in parts)
    form = await off_loop(read_edit_form, front.card, parts, size=size)
    fields = flat(form.fields)
    images, masks = await from_json(front, fields)  # of `extra_body`
    return fields, form.images + images, form.masks + masks


async def _answer(
    front: Front, request: Request, ask: ImagesAsk, kind: str, store: ImageStore
) -> Response:
    record_of(request.scope).note(images=len(ask.requests), format=ask.format, sse=ask.stream)
    try:
        if ask.stream:
            return await streamed(_events(front, request, ask, kind), "text/event-stream")
        return await _whole(front, request, ask, store)
    except InvalidRequest as error:
        raise ask.params.in_words(error) from None


async def _whole(front: Front, request: Request, ask: ImagesAsk, store: ImageStore) -> Response:
    outcomes = [_Outcome() for _ in ask.requests]
    async with running_all(front, request, ask.requests) as runs:
        async for index, events in merged(runs):
            for event in events:
                outcomes[index].push(event)
    images = [await off_loop(drawn, outcome.png(), ask, always=True) for outcome in outcomes]
    if ask.url:
        images = [_kept(store, request, image, ask.format) for image in images]
    usages = [outcome.usage for outcome in outcomes]
    body = await off_loop(reply, images, usages, ask, always=True)
    return Response(body, media_type="application/json")


async def _events(
    front: Front, request: Request, ask: ImagesAsk, kind: str
) -> AsyncGenerator[bytes, None]:
    outcome, previews, begun = _Outcome(), Previews(ask), False
    try:
        async with running(front, request, ask.requests[0]) as run:
            async for event in run.events():
                outcome.push(event)
                shown = isinstance(event, ProgressChunk) and event.preview
                if shown and event.step < event.steps and previews.wants(event.steps):
                    image = await off_loop(drawn, event.preview, ask, always=True)
                    begun = True
                    yield await off_loop(partial, kind, image, previews.sent, ask, always=True)
                    previews.sent += 1
        image = await off_loop(drawn, outcome.png(), ask, always=True)
        last = await off_loop(completed, kind, image, outcome.usage, ask, always=True)
        begun = True
        yield last
    except Exception as error:
        if not begun:
            raise
        told = ask.params.in_words(error) if isinstance(error, InvalidRequest) else error
        yield error_event(told, request.scope)


class _Outcome:
    """What one request of the engine has made so far."""

    def __init__(self) -> None:
        self.usage = Usage()
        self._png: bytes | None = None
        self._said = ""
        self._reason: str | None = None

    def push(self, event: Any) -> None:
        """Take one event; of several images the last one counts."""
        if isinstance(event, ImageChunk):
            self._png = event.data or self._png
        elif isinstance(event, TextChunk) and len(self._said) < _SAID:
            self._said += event.text
        self.usage = event.usage or self.usage
        self._reason = event.finish_reason or self._reason

    def png(self) -> bytes:
        """The image.

        Raises:
            RequestFailed: there is none; says what the model said instead.
        """
        if self._png is None:
            said = f"; it said: {self._said[:_SAID]}" if self._said else ""
            raise RequestFailed(f"the model made no image (finish_reason={self._reason}){said}")
        return self._png


def _kept(store: ImageStore, request: Request, image: Drawn, format: str) -> Drawn:
    """Keep the file; the URL is that of the host to which the request was sent."""
    name = store.add(image.data, format)
    asyncio.get_running_loop().call_later(store.seconds + 1, store.sweep)
    base = f"{request.url.scheme}://{request.url.netloc}{request.scope.get('root_path', '')}"
    return dataclasses.replace(image, data=b"", url=f"{base}{IMAGE_FILES}{name}")
