"""`POST /v1/audio/speech`: speech as one file that is sent while it is spoken, or as SSE."""

from __future__ import annotations

import base64
import json
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
from mstar.http.errors import Refused, openai_error, refusal
from mstar.http.fields import check_text, seconds_of
from mstar.http.front import Front, off_loop
from mstar.http.middleware import Aborted
from mstar.http.openai.extras import model_parameters
from mstar.http.openai.models import check_model
from mstar.http.openai.surfaces import Adapter
from mstar.http.record import record_of
from mstar.http.running import running
from mstar.http.stream import streamed
from mstar.http.tempo import FASTEST, SLOWEST, Paced, check_speed
from mstar.types import AudioChunk, Usage

__all__ = ["speech_routes"]

_KNOWN = (
    *("model", "input", "voice", "instructions", "response_format", "speed", "stream_format"),
    "timeout",
)
_LARGE = 1 << 30  # work that is never done on the event loop
_STRING = {"type": "string"}
_SCHEMA = {
    "type": "object",
    "required": ["model", "input"],
    "properties": {
        "model": _STRING,
        "input": _STRING,
        "voice": {"anyOf": [_STRING, {"type": "object", "properties": {"id": _STRING}}]},
        "response_format": {**_STRING, "enum": list(FORMATS), "default": "mp3"},
        "stream_format": {**_STRING, "enum": ["audio", "sse"], "default": "audio"},
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


def speech_routes(front: Front, adapter: Adapter) -> APIRouter:
    """The speech route of a model that speaks."""
    router = APIRouter()

    @router.post("/v1/audio/speech", openapi_extra={"requestBody": {"content": _CONTENT}})
    async def speech(request: Request) -> Response:
        """Speak `input`."""
        front.check_open()
        fields = await read_json(front, request)
        header = request.headers.get("x-request-timeout")
        ask = _ask_of(front, adapter, fields, header)
        record_of(request.scope).note(format=ask.format, sse=ask.sse)
        if ask.sse:
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return await streamed(_sse(front, request, ask), "text/event-stream", headers)
        return await streamed(_file(front, request, ask), FORMATS[ask.format])

    return router


def _ask_of(front: Front, adapter: Adapter, fields: dict[str, Any], header: str | None) -> _Ask:
    check_model(front, fields.get("model"))
    fields = {name: value for name, value in fields.items() if value is not None}
    text = fields.get("input")
    if not isinstance(text, str):
        raise InvalidRequest("input", text, "must be the text to speak")
    check_text("input", text, front.settings)
    fields["voice"] = _voice(fields.get("voice"))
    _check_unsupported(front, fields)
    format = fields.get("response_format", "mp3")
    if not isinstance(format, str) or format not in FORMATS:
        allowed = f"must be one of {', '.join(FORMATS)}"
        raise InvalidRequest("response_format", format, allowed)
    check_encoder(format, front.engine.model.sample_rate)
    speed = check_speed(fields.get("speed", 1))
    stream_format = fields.get("stream_format", "audio")
    if stream_format not in ("audio", "sse"):
        raise InvalidRequest("stream_format", stream_format, "must be audio or sse")
    arguments = {**model_parameters(front.card, fields, _KNOWN), **adapter(fields)}
    asked = seconds_of("timeout", fields.get("timeout", header))
    arguments |= {"stream": True, "timeout": front.timeout(asked)}
    return _Ask(arguments, format, stream_format == "sse", speed)


def _voice(value: Any) -> str | None:
    """A string, or an object with an id."""
    name = value.get("id", 0) if isinstance(value, dict) else value
    if name is not None and not isinstance(name, str):
        raise InvalidRequest("voice", value, 'must be a string or {"id": ...}')
    return name


def _check_unsupported(front: Front, fields: dict[str, Any]) -> None:
    """Known fields that the model cannot honour are refused, never dropped."""
    name, parameters = front.card.name, front.card.parameters
    instructions = fields.get("instructions", "")
    if not isinstance(instructions, str):
        raise InvalidRequest("instructions", instructions, "must be a string")
    if instructions and "instructions" not in parameters:
        raise _unsupported("instructions", instructions, f"{name} takes no instructions")
    if fields["voice"] is not None and "voice" not in parameters:
        fields["voice"] = None  # required by OpenAI's clients, so it is sent to any model


def _unsupported(field: str, value: Any, allowed: str) -> Refused:
    message = str(InvalidRequest(field, value, allowed))
    return Refused(400, message, param=field, code="unsupported_parameter")


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
                    encoder = await off_loop(_encoder, self._ask, rate, size=_LARGE)
                if sound:
                    pcm = np.concatenate([event.pcm for event in sound])
                    size = len(pcm) * encoder.weight if begun else _LARGE
                    begun = True
                    piece = await off_loop(encoder.push, pcm, size=size)
                    if piece:
                        yield piece
                last = events[-1]
                self.usage = last.usage or self.usage
                reason = last.finish_reason
        if encoder is None:
            raise RequestFailed(f"the model made no sound (finish_reason={reason})")
        piece = await off_loop(encoder.finish, size=_LARGE)
        if piece:
            yield piece


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
        raise Aborted(str(error)) from error


async def _sse(front: Front, request: Request, ask: _Ask) -> AsyncGenerator[bytes, None]:
    begun = False
    pieces = _Pieces(front, request, ask)
    try:
        async with aclosing(pieces.made()) as made:
            async for piece in made:
                begun = True
                audio = base64.b64encode(piece).decode()
                yield _event({"type": "speech.audio.delta", "audio": audio})
    except Exception as error:
        if not begun:
            raise
        refused = refusal(error)
        record_of(request.scope).note(error=refused.kind)
        yield _event(openai_error(refused))
        return
    read, spoken = pieces.usage.prompt_tokens, pieces.usage.generated_tokens
    usage = {"input_tokens": read, "output_tokens": spoken, "total_tokens": read + spoken}
    yield _event({"type": "speech.audio.done", "usage": usage})


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"
