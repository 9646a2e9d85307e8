"""`POST /v1/audio/speech`: raw PCM as it is spoken, or server-sent events."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from mstar.bench.audio import PcmMeter, is_pcm
from mstar.bench.prompts import Prompt
from mstar.bench.routes.base import Reader, Request, Route, SseReader, number, parsed, words_of
from mstar.bench.trace import Bad, Trace
from mstar.errors import InvalidRequest

__all__ = ["Speech"]


class Speech(Route):
    """Asks for 24 kHz PCM, the only format whose length is known as it comes."""

    use = "speak"

    def request(self, prompt: Prompt, seed: int | None) -> Request:
        ask = self.ask
        if ask.attached:
            raise InvalidRequest("--attach", ask.attached[0].name, "speech takes text only")
        body = {
            "model": ask.model,
            "input": prompt.text,
            "voice": ask.voice or (prompt.voice if "orpheus" in (ask.model or "") else None),
            "response_format": "pcm",
            "stream_format": "sse" if ask.sse else None,
            "max_tokens": ask.max_tokens,
            "ignore_eos": ask.ignore_eos or None,
            "seed": seed,
        }
        return self._json("/v1/audio/speech", body)

    def reader(self, trace: Trace, content_type: str) -> Reader:
        if "event-stream" in content_type:
            answer = _Events(trace)
            return SseReader(answer.event, answer.end)
        return _Raw(trace, content_type)


class _Raw(Reader):
    def __init__(self, trace: Trace, content_type: str) -> None:
        self._trace, self._type = trace, content_type
        self._meter = PcmMeter(content_type)
        self._json = b"" if "json" in content_type else None

    def feed(self, at: float, piece: bytes) -> None:
        trace = self._trace
        if self._json is not None:
            self._json += piece
            return
        if not trace.audio:
            trace.audio_is_timed = is_pcm(self._type, piece)
        seconds = self._meter.feed(piece) if trace.audio_is_timed else 0.0
        trace.audio.append((at, seconds))

    def finish(self, at: float) -> None:
        if self._json is not None:
            said = parsed(self._json)
            raise Bad("error in the answer", words_of(said.get("error") or said))


class _Events:
    def __init__(self, trace: Trace) -> None:
        self._trace, self._meter = trace, PcmMeter()
        self._done = False

    def event(self, at: float, name: str, said: dict[str, Any]) -> None:
        trace, kind = self._trace, said.get("type") or name
        if kind == "speech.audio.done":
            self._done = True
            usage = said.get("usage")
            if isinstance(usage, dict):
                trace.prompt_tokens = number(usage.get("input_tokens"))
                trace.tokens = number(usage.get("output_tokens"))
        elif isinstance(said.get("audio"), str) and said["audio"]:
            try:
                data = base64.b64decode(said["audio"], validate=True)
            except (binascii.Error, ValueError) as error:
                raise Bad("strange audio", f"not base64: {error}") from None
            if not trace.audio:
                trace.audio_is_timed = is_pcm("", data)
            seconds = self._meter.feed(data) if trace.audio_is_timed else 0.0
            trace.audio.append((at, seconds))

    def end(self, told: bool) -> None:
        if not (told or self._done):
            raise Bad("ended early", "the stream ended without speech.audio.done")
