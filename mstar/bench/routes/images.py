"""`POST /v1/images/generations`, or `/v1/images/edits` where there is a picture to start from."""

from __future__ import annotations

import json
from typing import Any

from mstar.bench.prompts import Prompt
from mstar.bench.routes.base import DocumentReader, Reader, Request, Route, SseReader, number
from mstar.bench.trace import Bad, Trace
from mstar.errors import InvalidRequest

__all__ = ["Images"]


class Images(Route):
    """One JSON document, or server-sent events."""

    use = "paint"

    def request(self, prompt: Prompt, seed: int | None) -> Request:
        fields: dict[str, Any] = {"model": self.ask.model, "prompt": prompt.text, "seed": seed}
        fields["stream"] = True if self.ask.sse else None
        if not self.ask.attached:
            return self._json("/v1/images/generations", fields)
        fields = {name: value for name, value in fields.items() if value is not None}
        return self._form({**fields, **self.ask.extra})

    def reader(self, trace: Trace, content_type: str) -> Reader:
        answer = _Answer(trace)
        if "event-stream" in content_type:
            return SseReader(answer.event, answer.end)
        return DocumentReader(answer.document)

    def _form(self, fields: dict[str, Any]) -> Request:
        from urllib3.filepost import encode_multipart_formdata

        parts: list[tuple[str, Any]] = [
            (name, value if isinstance(value, str) else json.dumps(value))
            for name, value in fields.items()
        ]
        name = "image" if len(self.ask.attached) == 1 else "image[]"
        for attachment in self.ask.attached:
            if attachment.kind != "image":
                raise InvalidRequest("--attach", attachment.name, "edits start from images")
            parts.append((name, (attachment.name, attachment.data)))
        body, content_type = encode_multipart_formdata(parts)
        return Request("/v1/images/edits", {"content-type": content_type}, body)


class _Answer:
    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def document(self, at: float, said: dict[str, Any]) -> None:
        data = said.get("data")
        for item in data if isinstance(data, list) else ():
            if isinstance(item, dict) and (item.get("b64_json") or item.get("url")):
                self._trace.images.append(at)
        self._usage(said.get("usage"))

    def event(self, at: float, name: str, said: dict[str, Any]) -> None:
        kind = str(said.get("type") or name)
        if kind.endswith(".completed"):
            self._trace.images.append(at)
            self._usage(said.get("usage"))
        elif kind.endswith(".partial_image"):
            self._trace.other.append(at)

    def end(self, told: bool) -> None:
        if not self._trace.images:
            raise Bad("ended early", "the stream ended without a finished image")

    def _usage(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self._trace.prompt_tokens = number(usage.get("input_tokens"))
            self._trace.tokens = number(usage.get("output_tokens"))
