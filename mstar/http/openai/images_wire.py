"""Images as OpenAI's clients read them: whole replies, and events of a stream."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mstar.http.openai.common import data_event
from mstar.http.openai.images_ask import ImagesAsk
from mstar.io.image import transcode
from mstar.types import Usage

__all__ = ["Drawn", "Previews", "completed", "drawn", "partial", "reply"]


@dataclass(frozen=True)
class Drawn:
    """One image as it is sent: `url` instead of the data if there is one; edges in pixels."""

    data: bytes
    width: int
    height: int
    url: str | None = None

    @property
    def size(self) -> str:
        """OpenAI's word for it."""
        return f"{self.width}x{self.height}"


def drawn(png: bytes, ask: ImagesAsk) -> Drawn:
    """A model's PNG in the format that was asked for."""
    return Drawn(*transcode(png, ask.format, ask.compression))


def reply(images: Sequence[Drawn], usages: Sequence[Usage], ask: ImagesAsk) -> bytes:
    """The whole answer as JSON; its size is that of the first image."""
    data = [{"url": i.url} if i.url else {"b64_json": _base64(i.data)} for i in images]
    common = _common(ask, images[0].size)
    body = {"created": int(time.time()), "data": data, **common, "usage": _usage(usages)}
    return json.dumps(body).encode()


def partial(kind: str, image: Drawn, index: int, ask: ImagesAsk) -> bytes:
    """The event of a preview; its size is the one that was asked for, where there was one."""
    asked = ask.params.size
    size = image.size if asked is None else f"{asked[0]}x{asked[1]}"
    return _event(f"{kind}.partial_image", image, size, ask, partial_image_index=index)


def completed(kind: str, image: Drawn, usage: Usage, ask: ImagesAsk) -> bytes:
    """The last event of a stream."""
    return _event(f"{kind}.completed", image, image.size, ask, usage=_usage([usage]))


class Previews:
    """Chooses as many of the previews that a model makes as were asked for, evenly."""

    def __init__(self, ask: ImagesAsk) -> None:
        self._wanted, self._every = ask.partial_images, ask.params.every
        self._seen = self.sent = 0

    def wants(self, steps: int) -> bool:
        """Whether the next preview of an image in `steps` steps is to be sent."""
        if not self._wanted:
            return False
        coming = max(1, (steps - 1) // self._every)  # previews in all
        seen, self._seen = self._seen, self._seen + 1
        wanted = min(self._wanted, coming)
        chosen = self._seen * wanted // coming > seen * wanted // coming
        return chosen and self.sent < wanted


def _event(type: str, image: Drawn, size: str, ask: ImagesAsk, **more: Any) -> bytes:
    data = {"type": type, "b64_json": _base64(image.data), "created_at": int(time.time())}
    return data_event({**data, **_common(ask, size), **more}, type)


def _common(ask: ImagesAsk, size: str) -> dict[str, Any]:
    return {
        "background": "opaque",
        "output_format": ask.format,
        "quality": ask.quality,
        "size": size,
    }


def _usage(usages: Sequence[Usage]) -> dict[str, Any]:
    """Of several images the prompt counts once."""
    read = max(usage.prompt_tokens for usage in usages)
    seen = max(usage.image_tokens for usage in usages)
    made = sum(usage.generated_tokens for usage in usages)
    return {
        "input_tokens": read,
        "input_tokens_details": {"text_tokens": read - seen, "image_tokens": seen},
        "output_tokens": made,
        "total_tokens": read + made,
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
