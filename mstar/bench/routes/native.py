"""`POST /generate`: the native route, streamed as NDJSON."""

from __future__ import annotations

from typing import Any

from mstar.bench.prompts import Prompt
from mstar.bench.routes.base import Reader, Request, Route
from mstar.bench.trace import Bad, Trace
from mstar.errors import MStarError
from mstar.form import make_form
from mstar.types import AudioChunk, Event, ImageChunk, TextChunk
from mstar.wire import Reply

__all__ = ["Native"]


class Native(Route):
    """Everything that a model makes; the parameters go as `model_kwargs`."""

    def request(self, prompt: Prompt, seed: int | None) -> Request:
        ask = self.ask
        media: dict[str, list[tuple[str, bytes]]] = {"image": [], "audio": [], "video": []}
        for attachment in ask.attached:
            media[attachment.kind].append((attachment.name, attachment.data))
        kwargs: dict[str, Any] = {
            "voice": ask.voice,
            "max_tokens": ask.max_tokens,
            "ignore_eos": ask.ignore_eos or None,
            "seed": seed,
            **ask.extra,
        }
        if prompt.messages is not None:
            kwargs["messages"] = list(prompt.messages)
        form = make_form(
            text=prompt.text if prompt.messages is None else None,
            images=media["image"] or None,
            audio=media["audio"] or None,
            video=media["video"] or None,
            output_modalities=ask.modalities or None,
            input_modalities=None,
            stream=True,
            request_id=None,
            **kwargs,
        )
        return Request("/generate", {"content-type": form.content_type}, form.body)

    def reader(self, trace: Trace, content_type: str) -> Reader:
        return _Lines(trace, stream="application/json" not in content_type)


class _Lines(Reader):
    def __init__(self, trace: Trace, stream: bool) -> None:
        self._trace = trace
        self._reply = Reply("/generate", stream)

    def feed(self, at: float, piece: bytes) -> None:
        try:
            for event in self._reply.feed(piece):
                self._take(at, event)
        except MStarError as error:
            raise Bad("error in the stream", str(error)) from None

    def finish(self, at: float) -> None:
        try:
            for event in self._reply.finish():
                self._take(at, event)
        except MStarError as error:
            raise Bad("ended early or broken", str(error)) from None

    def _take(self, at: float, event: Event) -> None:
        trace = self._trace
        if isinstance(event, TextChunk):
            if event.text:
                trace.text.append(at)
        elif isinstance(event, AudioChunk):
            if len(event.pcm):
                trace.audio.append((at, len(event.pcm) / event.sample_rate))
        elif isinstance(event, ImageChunk):
            trace.images.append(at)
        elif event.modality:
            trace.other.append(at)
        if event.finish_reason is not None:
            trace.finish_reason = event.finish_reason
        if event.usage is not None:
            trace.prompt_tokens = event.usage.prompt_tokens or None
            trace.tokens = event.usage.generated_tokens or None
            if not trace.audio:  # else the tokens are not those of the text alone
                trace.text_tokens = trace.tokens
