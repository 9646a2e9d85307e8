"""`POST /v1/audio/speech`: speech as one file that is sent while it is spoken, or as SSE."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from mstar.errors import InvalidRequest, MStarError, RequestFailed
from mstar.http.body import read_json
from mstar.http.encoders import FORMATS, Encoder, check_encoder, open_encoder
from mstar.http.errors import told
from mstar.http.fields import check_text, deadline
from mstar.http.front import Front, off_loop
from mstar.http.middleware import Aborted
from mstar.http.openai.common import (
    data_event,
    error_event,
    flat,
    model_parameters,
    renamed,
    schema_of,
    unsupported,
    voice_of,
)
from mstar.http.openai.models import check_model
from mstar.http.openai.surfaces import Adapter
from mstar.http.record import record_of
from mstar.http.running import running
from mstar.http.stream import streamed
from mstar.http.tempo import FASTEST, SLOWEST, Paced, check_speed
from mstar.models.parameters import Parameter
from mstar.types import AudioChunk, Usage

__all__ = ["speech_routes"]

_KNOWN = (
    *("model", "input", "voice", "instructions", "response_format", "speed", "stream_format"),
    "timeout",
)
_LIMIT = "max_output_tokens"  # the parameter that ends an answer with finish_reason=length
_FORMAT = Parameter("response_format", str, "mp3", choices=tuple(FORMATS))
_STREAM = Parameter("stream_format", str, "audio", choices=("audio", "sse"))
_STRING = {"type": "string"}
_SCHEMA = {
    "type": "object",
    "required": ["model", "input"],
    "properties": {
        "model": _STRING,
        "input": _STRING,
        "voice": {"anyOf": [_STRING, {"type": "object", "properties": {"id": _STRING}}]},
        **schema_of((_FORMAT, _STREAM)),
        "speed": {"type": "number", "default": 1, "minimum": SLOWEST, "maximum": FASTEST},
    },
}
_CONTENT = {"application/json": {"schema": _SCHEMA}}


@dataclass
class _Ask:
    arguments: dict[str, Any]
    format: str
    sse: bool
    speed: float
    field_of: dict[str, str]  # argument of the engine -> the client's field


def speech_routes(front: Front, adapter: Adapter) -> APIRouter:
    """The speech route of a model that speaks."""
    router = APIRouter()

    @router.post("/v1/audio/speech", openapi_extra={"requestBody": {"content": _CONTENT}})
    async def speech(request: Request) -> Response:
        """Speak `input`."""
        front.check_open()
        fields = await read_json(front, request)
        header = request.headers.get("x-request-timeout")
        args, size = (front, adapter, fields, header), record_of(request.scope).held
        ask = await off_loop(_ask_of, *args, size=size)
        record_of(request.scope).note(format=ask.format, sse=ask.sse)
        try:
            if ask.sse:
                return await streamed(_sse(front, request, ask), "text/event-stream")
            return await streamed(_file(front, request, ask), FORMATS[ask.format])
        except InvalidRequest as error:
            raise renamed(error, ask.field_of) from None

    return router


def _ask_of(front: Front, adapter: Adapter, fields: dict[str, Any], header: str | None) -> _Ask:
    fields = flat(fields)
    check_model(front, fields.get("model"))
    text = fields.get("input")
    if not isinstance(text, str):
        raise InvalidRequest("input", text, "must be the text to speak")
    check_text("input", text, front.settings)
    fields["voice"] = voice_of(fields.get("voice"), "voice")
    _check_unsupported(front, fields)
    format = _FORMAT.check(fields.get("response_format", "mp3"))
    check_encoder(format, front.engine.model.sample_rate)
    speed = check_speed(fields.get("speed", 1))
    sse = _STREAM.check(fields.get("stream_format", "audio")) == "sse"
    extras = model_parameters(front.card, fields, _KNOWN)
    seconds = deadline(front.settings, header, fields.get("timeout"))
    arguments = {**extras, **adapter(fields), "stream": True, "timeout": seconds}
    field_of = {front.card.parameters[name].name: name for name in extras}
    return _Ask(arguments, format, sse, speed, {"text": "input", **field_of})


def _check_unsupported(front: Front, fields: dict[str, Any]) -> None:
    """Known fields that the model cannot honour are refused, never dropped."""
    name, parameters = front.card.name, front.card.parameters
    instructions = fields.get("instructions", "")
    if not isinstance(instructions, str):
        raise InvalidRequest("instructions", instructions, "must be a string")
    if instructions and "instructions" not in parameters:
        raise unsupported("instructions", instructions, f"{name} takes no instructions")
    if fields["voice"] is not None and "voice" not in parameters:
        fields["voice"] = None  # required by OpenAI's clients, so it is sent to any model


class _Pieces:
    """The encoded pieces of one request; `usage` is known at the end."""

    def __init__(self, front: Front, request: Request, ask: _Ask) -> None:
        self._front, self._request, self._ask = front, request, ask
        self.usage = Usage()

    async def made(self) -> AsyncGenerator[bytes, None]:
        """Each as soon as it is certain."""
        encoder, begun = None, False
        async with running(self._front, self._request, self._ask.arguments) as run:
            async for events in run.batches():
                sound = [e for e in events if isinstance(e, AudioChunk) and len(e.pcm)]
                if sound and encoder is None:
                    rate = sound[0].sample_rate
                    encoder = await off_loop(_encoder, self._ask, rate, always=True)
                if sound:
                    pcm = np.concatenate([event.pcm for event in sound])
                    size = len(pcm) * encoder.weight
                    piece = await off_loop(encoder.push, pcm, size=size, always=not begun)
                    begun = True
                    if piece:
                        yield piece
                last = events[-1]
                self.usage = last.usage or self.usage
                reason = last.finish_reason
        if encoder is None:
            raise self._silent(reason)
        piece = await off_loop(encoder.finish, always=True)
        if piece:
            yield piece

    def _silent(self, reason: str | None) -> MStarError:
        """The error for an answer without sound."""
        field = self._ask.field_of.get(_LIMIT)
        if reason == "length" and field is not None:
            return InvalidRequest(field, self._ask.arguments[field], "is too few to make any sound")
        return RequestFailed(f"the model made no sound (finish_reason={reason})")


def _encoder(ask: _Ask, sample_rate: int) -> Encoder:
    encoder = open_encoder(ask.format, sample_rate)
    return encoder if ask.speed == 1 else Paced(encoder, ask.speed, sample_rate)


async def _file(front: Front, request: Request, ask: _Ask) -> AsyncGenerator[bytes, None]:
    begun = False
    try:
        async with aclosing(_Pieces(front, request, ask).made()) as pieces:
            async for piece in pieces:
                begun = True
                yield piece
    except MStarError as error:
        if not begun:
            raise
        raise Aborted(told(error, request.scope).reason) from error


async def _sse(front: Front, request: Request, ask: _Ask) -> AsyncGenerator[bytes, None]:
    begun = False
    pieces = _Pieces(front, request, ask)
    try:
        async with aclosing(pieces.made()) as made:
            async for piece in made:
                begun = True
                audio = base64.b64encode(piece).decode()
                yield data_event({"type": "speech.audio.delta", "audio": audio})
    except Exception as error:
        if not begun:
            raise
        yield error_event(renamed(error, ask.field_of), request.scope)
        return
    read, spoken = pieces.usage.prompt_tokens, pieces.usage.generated_tokens
    usage = {"input_tokens": read, "output_tokens": spoken, "total_tokens": read + spoken}
    yield data_event({"type": "speech.audio.done", "usage": usage})
