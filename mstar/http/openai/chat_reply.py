"""A completion in one piece."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from fastapi import Request
from starlette.responses import Response

from mstar.http.encoders import encode_whole
from mstar.http.front import Front, off_loop
from mstar.http.openai.chat_request import ChatAsk
from mstar.http.openai.chat_shapes import (
    Envelope,
    ended,
    image_part,
    logprobs_of,
    new_audio_id,
    usage_of,
)
from mstar.http.openai.kept import Kept
from mstar.http.running import merged, running_all
from mstar.http.wire import size_of
from mstar.types import AudioChunk, Event, ImageChunk, TextChunk, Usage

__all__ = ["completion"]


async def completion(
    front: Front, request: Request, ask: ChatAsk, transcripts: Kept[str]
) -> Response:
    """Run the request and answer with all of it."""
    choices: list[list[Event]] = [[] for _ in ask.arguments]
    async with running_all(front, request, ask.arguments) as runs:
        async for index, events in merged(runs):
            choices[index] += events
    envelope = Envelope(ask.model, front.card.name)
    work = {"size": sum(map(size_of, choices)), "always": ask.audio_format is not None}
    body = await off_loop(_written, envelope, ask, choices, transcripts, **work)
    return Response(body, media_type="application/json")


def _written(
    envelope: Envelope, ask: ChatAsk, choices: list[list[Event]], transcripts: Kept[str]
) -> bytes:
    made = [_choice(index, ask, events, transcripts) for index, events in enumerate(choices)]
    usages = [events[-1].usage or Usage() for events in choices]
    return json.dumps(envelope.full(made, usage_of(usages, ask.modalities))).encode()


def _choice(
    index: int, ask: ChatAsk, events: list[Event], transcripts: Kept[str]
) -> dict[str, Any]:
    return {
        "index": index,
        "message": _message(ask, events, transcripts),
        "logprobs": logprobs_of(events) if ask.logprobs else None,
        "finish_reason": ended(events[-1].finish_reason),
    }


def _message(ask: ChatAsk, events: list[Event], transcripts: Kept[str]) -> dict[str, Any]:
    """Sound takes the place of the text, which is its transcript; images make a list of parts."""
    text = "".join(event.text for event in events if isinstance(event, TextChunk))
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    sound = [event for event in events if isinstance(event, AudioChunk) and len(event.pcm)]
    if sound and ask.audio_format is not None:
        message["content"] = None
        message["audio"] = _audio(ask.audio_format, sound, text, transcripts)
    if any(isinstance(event, ImageChunk) for event in events):
        message["content"] = _parts(events, with_text=message["content"] is not None)
    return message


def _audio(
    format: str, sound: list[AudioChunk], text: str, transcripts: Kept[str]
) -> dict[str, Any]:
    pcm = np.concatenate([event.pcm for event in sound])
    data = encode_whole(format, pcm, sound[0].sample_rate)
    id = new_audio_id()
    return {
        "id": id,
        "data": base64.b64encode(data).decode(),
        "expires_at": transcripts.put(id, text),
        "transcript": text,
    }


def _parts(events: list[Event], *, with_text: bool) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, ImageChunk):
            parts.append(image_part(base64.b64encode(event.data).decode()))
        elif isinstance(event, TextChunk) and event.text and with_text:
            if parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += event.text
            else:
                parts.append({"type": "text", "text": event.text})
    return parts
