"""A completion in chunks, as it is made."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from fastapi import Request

from mstar.http.encoders import Encoder, open_encoder
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
from mstar.http.openai.common import data_event, error_event
from mstar.http.openai.kept import Kept
from mstar.http.running import Running, merged, running_all
from mstar.http.wire import size_of
from mstar.types import AudioChunk, Event, ImageChunk, TextChunk

__all__ = ["completion_chunks"]


async def completion_chunks(
    front: Front, request: Request, ask: ChatAsk, transcripts: Kept[str]
) -> AsyncGenerator[bytes, None]:
    """Server-sent events. Whatever goes wrong after the first of them is said in the last one."""
    begun = False
    envelope = Envelope(ask.model, front.card.name)
    choices = [_Choice(index, ask, transcripts) for index in range(len(ask.arguments))]
    try:
        async with running_all(front, request, ask.arguments) as runs:
            async for index, events in merged(runs):
                choice = choices[index]
                work = {"size": choice.weight(events), "always": choice.opens(events)}
                deltas = await off_loop(choice.deltas, events, **work)
                usage = _Usage(ask, runs)
                args = (envelope, usage.so_far(), deltas)
                yield await off_loop(_written, *args, size=size_of(events))
                begun = True
            if ask.include_usage:
                yield data_event({**envelope.chunk([]), "usage": usage.total()})
    except Exception as error:
        if not begun:
            raise
        yield error_event(ask.renamed(error), request.scope)
        return
    yield b"data: [DONE]\n\n"


def _written(envelope: Envelope, usage: dict[str, Any], deltas: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(data_event({**envelope.chunk([delta]), **usage}) for delta in deltas)


class _Usage:
    """The counts of all choices, which go up while they run."""

    def __init__(self, ask: ChatAsk, runs: Sequence[Running]) -> None:
        self._ask, self._runs = ask, runs

    def total(self) -> dict[str, Any]:
        """As they are now."""
        return usage_of([run.handle.usage for run in self._runs], self._ask.modalities)

    def so_far(self) -> dict[str, Any]:
        """The part of a chunk that tells them."""
        if self._ask.running_usage:
            return {"usage": self.total()}
        return {"usage": None} if self._ask.include_usage else {}


class _Choice:
    """One choice: its events become the entries of `choices` in chunks."""

    def __init__(self, index: int, ask: ChatAsk, transcripts: Kept[str]) -> None:
        self._index, self._ask, self._transcripts = index, ask, transcripts
        self._begun = False
        self._encoder: Encoder | None = None
        self._audio_id: str | None = None
        self._said: list[str] = []

    def opens(self, events: Sequence[Event]) -> bool:
        """Whether an encoder is opened for them, which takes time."""
        sound = any(isinstance(event, AudioChunk) and len(event.pcm) for event in events)
        return sound and self._encoder is None

    def weight(self, events: Sequence[Event]) -> int:
        """About how much work `deltas` has with them, in bytes that could be copied instead."""
        return size_of(events) * (self._encoder.weight if self._encoder is not None else 1)

    def deltas(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """What to send for them; events of one kind that came together go together."""
        return list(self._deltas(events))

    def _deltas(self, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
        if not self._begun:
            self._begun = True
            yield self._entry({"role": "assistant", "content": ""})
        for kind, group in groupby(events, type):
            several = list(group)
            if kind is TextChunk:
                yield from self._text(several)
            elif kind is AudioChunk:
                yield from self._sound([event.pcm for event in several], several[0].sample_rate)
            elif kind is ImageChunk:
                images = [image_part(base64.b64encode(e.data).decode()) for e in several]
                yield self._entry({"content": images})
        if events[-1].finish_reason is not None:
            yield from self._end()
            yield self._entry({}, finish_reason=ended(events[-1].finish_reason))

    def _text(self, events: list[TextChunk]) -> Iterator[dict[str, Any]]:
        text = "".join(event.text for event in events)
        logprobs = logprobs_of(events) if self._ask.logprobs else None
        if not text and not (logprobs and logprobs["content"]):
            return
        if self._ask.audio_format is None:
            yield self._entry({"content": text}, logprobs)
        else:
            self._said.append(text)
            yield self._entry(self._audio(transcript=text), logprobs)

    def _sound(self, pieces: list[np.ndarray], rate: int) -> Iterator[dict[str, Any]]:
        pcm = np.concatenate(pieces)
        if not len(pcm) or self._ask.audio_format is None:
            return
        if self._encoder is None:
            self._encoder = open_encoder(self._ask.audio_format, rate)
        if data := self._encoder.push(pcm):
            yield self._entry(self._audio(data=base64.b64encode(data).decode()))

    def _end(self) -> Iterator[dict[str, Any]]:
        """What is left of the sound, and until when it can be referred to."""
        if self._encoder is not None and (data := self._encoder.finish()):
            yield self._entry(self._audio(data=base64.b64encode(data).decode()))
        if self._audio_id is not None:
            expires = self._transcripts.put(self._audio_id, "".join(self._said))
            entry = self._entry({"audio": {"expires_at": expires}})
            del entry["finish_reason"]
            yield entry

    def _audio(self, **piece: str) -> dict[str, Any]:
        if self._audio_id is None:
            self._audio_id = new_audio_id()
            piece["id"] = self._audio_id
        return {"audio": piece}

    def _entry(
        self,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
