"""`POST /v1/images/generations` and `/v1/images/edits`: whole, as a stream, or kept under a URL."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mstar.errors import InvalidRequest, RequestFailed
from mstar.http.body import read_json
from mstar.http.errors import Refused
from mstar.http.front import Front, off_loop
from mstar.http.middleware import IMAGE_FILES
from mstar.http.openai.common import error_event
from mstar.http.openai.images_ask import ImagesAsk, ask_of
from mstar.http.openai.images_edit import read_edit
from mstar.http.openai.images_fields import EDIT, GENERATION
from mstar.http.openai.images_surface import ImagesSurface
from mstar.http.openai.images_wire import Drawn, Previews, completed, drawn, partial, reply
from mstar.http.openai.kept import Kept
from mstar.http.record import record_of
from mstar.http.running import merged, running, running_all
from mstar.http.stream import streamed
from mstar.io.image import FORMATS
from mstar.types import Event, GenerateResult, ProgressChunk, Usage, fold

__all__ = ["images_routes"]

_SAID = 300  # characters shown of what a model says instead of drawing


def images_routes(front: Front, surface: ImagesSurface) -> APIRouter:
    """The images routes of a model that draws, and the files that their URLs lead to."""
    router = APIRouter()
    store: Kept[bytes] = Kept(1000, 256 * 2**20)

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
            asked = await ask(request, *await read_edit(front, surface, request))
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


async def _answer(
    front: Front, request: Request, ask: ImagesAsk, kind: str, store: Kept[bytes]
) -> Response:
    record_of(request.scope).note(images=len(ask.requests), format=ask.format, sse=ask.stream)
    try:
        if ask.stream:
            return await streamed(_events(front, request, ask, kind), "text/event-stream")
        return await _whole(front, request, ask, store)
    except InvalidRequest as error:
        raise ask.params.in_words(error) from None


async def _whole(front: Front, request: Request, ask: ImagesAsk, store: Kept[bytes]) -> Response:
    made: list[list[Event]] = [[] for _ in ask.requests]
    async with running_all(front, request, ask.requests) as runs:
        async for index, events in merged(runs):
            made[index] += events
    results = [fold(events) for events in made]
    images = [await off_loop(drawn, _png(result), ask, always=True) for result in results]
    if ask.url:
        images = [_kept(store, request, image, ask.format) for image in images]
    usages = [result.usage or Usage() for result in results]
    body = await off_loop(reply, images, usages, ask, always=True)
    return Response(body, media_type="application/json")


async def _events(
    front: Front, request: Request, ask: ImagesAsk, kind: str
) -> AsyncGenerator[bytes, None]:
    made: list[Event] = []
    previews, begun = Previews(ask), False
    try:
        async with running(front, request, ask.requests[0]) as run:
            async for event in run.events():
                if not isinstance(event, ProgressChunk):
                    made.append(event)
                elif event.preview and event.step < event.steps and previews.wants(event.steps):
                    image = await off_loop(drawn, event.preview, ask, always=True)
                    begun = True
                    yield await off_loop(partial, kind, image, previews.sent, ask, always=True)
                    previews.sent += 1
        result = fold(made)
        image = await off_loop(drawn, _png(result), ask, always=True)
        usage = result.usage or Usage()
        last = await off_loop(completed, kind, image, usage, ask, always=True)
        begun = True
        yield last
    except Exception as error:
        if not begun:
            raise
        told = ask.params.in_words(error) if isinstance(error, InvalidRequest) else error
        yield error_event(told, request.scope)


def _png(result: GenerateResult) -> bytes:
    """The last image that there is.

    Raises:
        RequestFailed: there is none; says what the model said instead.
    """
    if not any(result.images):
        said = f"; it said: {result.text[:_SAID]}" if result.text else ""
        raise RequestFailed(f"the model made no image (finish_reason={result.finish_reason}){said}")
    return [png for png in result.images if png][-1]


def _kept(store: Kept[bytes], request: Request, image: Drawn, format: str) -> Drawn:
    """Keep the file; the URL is that of the host to which the request was sent."""
    name = f"{secrets.token_urlsafe(24)}.{format}"
    store.put(name, image.data)
    asyncio.get_running_loop().call_later(store.seconds + 1, store.sweep)
    base = f"{request.url.scheme}://{request.url.netloc}{request.scope.get('root_path', '')}"
    return dataclasses.replace(image, data=b"", url=f"{base}{IMAGE_FILES}{name}")
