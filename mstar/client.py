"""The generating methods that `Engine` and the HTTP client share, and the names that go with them.

Needs numpy only: neither torch nor transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from mstar.errors import (
    EngineClosed,
    EngineOverloaded,
    InvalidRequest,
    ModelNotFound,
    MStarError,
    OutOfMemory,
    RequestCancelled,
    RequestFailed,
    RequestStopped,
    RequestTimeout,
    WeightsError,
)
from mstar.types import (
    ActionChunk,
    AudioBuffer,
    AudioChunk,
    Event,
    GenerateResult,
    ImageChunk,
    LatentChunk,
    TextChunk,
    Usage,
)

__all__ = [
    "ActionChunk",
    "AudioBuffer",
    "AudioChunk",
    "EngineClosed",
    "EngineOverloaded",
    "Event",
    "GenerateMethods",
    "GenerateResult",
    "ImageChunk",
    "InvalidRequest",
    "LatentChunk",
    "MStarError",
    "ModelNotFound",
    "OutOfMemory",
    "RequestCancelled",
    "RequestFailed",
    "RequestStopped",
    "RequestTimeout",
    "TextChunk",
    "Usage",
    "WeightsError",
]


class GenerateMethods(ABC):
    """One vocabulary, whether the model runs in this process or behind HTTP.

    Everything is said in terms of `generate`. Media is a path, raw bytes, `(filename, bytes)`, or a
    list of those.
    """

    @abstractmethod
    def generate(
        self,
        *,
        text: str | None = None,
        images: Any = None,
        audio: Any = None,
        video: Any = None,
        output_modalities: Sequence[str] | None = None,
        input_modalities: Sequence[str] | None = None,
        stream: bool = False,
        request_id: str | None = None,
        **model_kwargs: Any,
    ) -> GenerateResult | Iterator[Event]:
        """Run one request: its result, or with `stream=True` an iterator over its events.

        Without `output_modalities` the model makes what it is for: text, if it can.

        Raises:
            InvalidRequest: an input or a parameter is not accepted.
            EngineOverloaded: too many requests are waiting.
            RequestFailed: the model failed while it served this request.
        """

    def chat(
        self,
        prompt: str,
        *,
        images: Any = None,
        audio: Any = None,
        output_modalities: Sequence[str] = ("text",),
        stream: bool = False,
        **kwargs: Any,
    ) -> GenerateResult | Iterator[Event]:
        """Answer a prompt, with pictures and sound beside it."""
        return self.generate(
            text=prompt,
            output_modalities=output_modalities,
            stream=stream,
            **_given(images=images, audio=audio, **kwargs),
        )

    def generate_image(self, prompt: str, **kwargs: Any) -> bytes:
        """Paint one image and return it as PNG."""
        result = self._whole(prompt, "image", kwargs)
        if not result.images:
            raise RequestFailed(f"the model made no image (finish_reason={result.finish_reason})")
        return result.images[0]

    def tts(self, text: str, *, voice: str | None = None, **kwargs: Any) -> AudioBuffer:
        """Speak `text`."""
        result = self._whole(text, "audio", {"voice": voice, **kwargs})
        if result.audio is None:
            raise RequestFailed(f"the model made no sound (finish_reason={result.finish_reason})")
        return result.audio

    def stream(self, **kwargs: Any) -> Iterator[Event]:
        """`generate(stream=True)`: the events of a request as they come.

        The last event is empty and carries `finish_reason` and `usage`.
        """
        return self.generate(stream=True, **_given(**kwargs))

    def _whole(self, text: str, modality: str, kwargs: dict[str, Any]) -> GenerateResult:
        """The complete result of a request for one modality."""
        return self.generate(
            text=text, output_modalities=(modality,), stream=False, **_given(**kwargs)
        )


def _given(**kwargs: Any) -> dict[str, Any]:
    """The arguments that are not `None`."""
    return {name: value for name, value in kwargs.items() if value is not None}
