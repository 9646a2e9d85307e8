"""`POST /v1/chat/completions`, streamed: text, and sound beside it."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from mstar.bench.audio import PcmMeter
from mstar.bench.prompts import Attachment, Prompt
from mstar.bench.routes.base import (
    DocumentReader,
    Reader,
    Request,
    Route,
    SseReader,
    data_url,
    number,
)
from mstar.bench.trace import Bad, Trace

__all__ = ["Chat"]


class Chat(Route):
    """Text is any piece of content, reasoning, transcript, refusal or tool arguments."""

    def request(self, prompt: Prompt, seed: int | None) -> Request:
        ask = self.ask
        audio = {"format": "pcm16", **({"voice": ask.voice} if ask.voice else {})}
        body = {
            "model": ask.model,
            "messages": self._messages(prompt),
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_completion_tokens": ask.max_tokens,
            "ignore_eos": ask.ignore_eos or None,
            "seed": seed,
            "modalities": list(ask.modalities) or None,
            "audio": audio if "audio" in ask.modalities else None,
        }
        return self._json("/v1/chat/completions", body)

    def reader(self, trace: Trace, content_type: str) -> Reader:
        answer = _Answer(trace)
        if "json" in content_type:
            return DocumentReader(answer.document)
        return SseReader(answer.event, answer.end)

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        if prompt.messages is not None:
            return list(prompt.messages)
        content: Any = prompt.text
        if self.ask.attached:
            content = [_part(attachment) for attachment in self.ask.attached]
            content.append({"type": "text", "text": prompt.text})
        return [{"role": "user", "content": content}]


def _part(attachment: Attachment) -> dict[str, Any]:
    form = attachment.name.rsplit(".", 1)[-1].lower()
    if attachment.kind == "audio" and form in ("wav", "mp3"):
        data = base64.b64encode(attachment.data).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": form}}
    kind = f"{attachment.kind}_url"
    return {"type": kind, kind: {"url": data_url(attachment)}}


class _Answer:
    """Reads chunks; a field that is missing, null or unknown is no reason to give up."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._meter = PcmMeter()

    def event(self, at: float, name: str, chunk: dict[str, Any]) -> None:
        self._usage(chunk.get("usage"))
        sound = chunk.get("modality") == "audio"  # how some servers mark sound in `content`
        for choice in chunk.get("choices") or ():
            self._take(at, choice, choice.get("delta") or {}, sound)

    def document(self, at: float, whole: dict[str, Any]) -> None:
        """An answer of a server that does not stream."""
        self._usage(whole.get("usage"))
        for choice in whole.get("choices") or ():
            self._take(at, choice, choice.get("message") or {}, False)

    def end(self, told: bool) -> None:
        if not told and self._trace.finish_reason is None:
            raise Bad("ended early", "the stream ended without finish_reason and [DONE]")

    def _take(self, at: float, choice: dict, delta: dict, sound: bool) -> None:
        trace = self._trace
        content, audio = delta.get("content"), delta.get("audio")
        if sound and isinstance(content, str):
            content, audio = None, {"data": content}
        if isinstance(content, list):
            kinds = [part.get("type") for part in content if isinstance(part, dict)]
            trace.images.extend([at] * sum(kind in ("image_url", "image") for kind in kinds))
            content = "text" in kinds
        audio = audio if isinstance(audio, dict) else {}
        told = ("reasoning_content", "reasoning", "refusal", "tool_calls")
        if content or audio.get("transcript") or any(delta.get(name) for name in told):
            trace.text.append(at)
        if audio.get("data"):
            trace.audio.append((at, self._seconds(audio["data"])))
        trace.finish_reason = choice.get("finish_reason") or trace.finish_reason

    def _seconds(self, data: str) -> float:
        try:
            return self._meter.feed(base64.b64decode(data, validate=True))
        except (binascii.Error, ValueError, TypeError) as error:
            raise Bad("strange audio", f"not base64: {error}") from None

    def _usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        trace = self._trace
        details = usage.get("completion_tokens_details")
        text = number(details.get("text_tokens")) if isinstance(details, dict) else None
        prompt, made = number(usage.get("prompt_tokens")), number(usage.get("completion_tokens"))
        trace.prompt_tokens = trace.prompt_tokens if prompt is None else prompt
        if made is not None:
            trace.tokens, trace.text_tokens = made, text or made
