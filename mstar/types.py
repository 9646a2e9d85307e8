"""What crosses the boundary of mstar: events, results and usage. Needs numpy only."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "ActionChunk",
    "AudioBuffer",
    "AudioChunk",
    "Event",
    "GenerateResult",
    "ImageChunk",
    "LatentChunk",
    "ProgressChunk",
    "TextChunk",
    "Usage",
    "fold",
]

MODALITIES = ("text", "image", "audio", "video", "action", "latent")


@dataclass
class Usage:
    """What one request consumed and how long it took.

    Tokens count language-model tokens; `cached_tokens`, `image_tokens` and `audio_tokens` are among
    those of the prompt, `speech_tokens` and latent tokens of images among the generated ones. Times
    are seconds since the request was submitted.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0
    speech_tokens: int = 0
    audio_seconds: float = 0.0
    time_to_first_event: float | None = None
    total_time: float | None = None


@dataclass(kw_only=True)
class Event:
    """One thing given to the caller while a request runs.

    The last event of a stream is empty and carries `finish_reason` and `usage`.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    usage: Usage | None = None

    modality = ""


@dataclass
class TextChunk(Event):
    """Whole characters of text."""

    text: str
    modality = "text"


@dataclass
class ImageChunk(Event):
    """One encoded image (PNG)."""

    data: bytes
    modality = "image"

    def save(self, path: str | Path) -> None:
        """Write the image file as it is."""
        Path(path).write_bytes(self.data)


@dataclass
class AudioChunk(Event):
    """Mono PCM: `pcm` is int16 `[samples]` at `sample_rate` Hz."""

    pcm: np.ndarray
    sample_rate: int
    modality = "audio"


@dataclass
class ActionChunk(Event):
    """Robot actions, float32 `[horizon, action_dim]`."""

    actions: np.ndarray
    modality = "action"


@dataclass
class LatentChunk(Event):
    """A float32 array of latents; its shape is the model's."""

    latents: np.ndarray
    modality = "latent"


@dataclass
class ProgressChunk(Event):
    """`step` of `steps` is done; `preview` is a PNG of what comes of it, or empty.

    Made only where a parameter of the model asks for it.
    """

    step: int
    steps: int
    preview: bytes = b""
    modality = "progress"


@dataclass(eq=False)
class AudioBuffer:
    """Mono int16 PCM `[samples]` at `sample_rate` Hz."""

    pcm: np.ndarray
    sample_rate: int

    def __len__(self) -> int:
        return len(self.pcm)

    @property
    def seconds(self) -> float:
        """Playing time."""
        return len(self.pcm) / self.sample_rate

    def to_numpy(self) -> np.ndarray:
        """The samples as int16 `[samples]`."""
        return self.pcm

    def to_wav(self, path: str | Path | None = None) -> bytes:
        """A PCM16 mono WAV file, also written to `path` when one is given."""
        data = self.pcm.astype("<i2").tobytes()
        out = io.BytesIO()
        out.write(struct.pack("<4sI4s", b"RIFF", 36 + len(data), b"WAVE"))
        byte_rate = self.sample_rate * 2
        out.write(struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, self.sample_rate, byte_rate, 2, 16))
        out.write(struct.pack("<4sI", b"data", len(data)) + data)
        if path is not None:
            Path(path).write_bytes(out.getvalue())
        return out.getvalue()


@dataclass(eq=False)
class GenerateResult:
    """All events of one request, folded together."""

    text: str = ""
    images: list[bytes] = field(default_factory=list)
    audio: AudioBuffer | None = None
    actions: np.ndarray | None = None
    latents: list[np.ndarray] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    request_id: str | None = None
    raw: list[Event] = field(default_factory=list, repr=False)

    @property
    def labels(self) -> list[str]:
        """What a classifier found, likeliest first; empty if none was asked."""
        return self._told("labels")

    @property
    def scores(self) -> list[float]:
        """Probabilities of the `labels`."""
        return self._told("scores")

    def _told(self, name: str) -> list[Any]:
        return next((event.metadata[name] for event in self.raw if name in event.metadata), [])

    def save_image(self, path: str | Path, index: int = 0) -> None:
        """Write image number `index` as the PNG it is."""
        if not self.images:
            raise ValueError("the result holds no image")
        Path(path).write_bytes(self.images[index])

    def save_audio(self, path: str | Path) -> None:
        """Write the audio as a WAV file."""
        if self.audio is None:
            raise ValueError("the result holds no audio")
        self.audio.to_wav(path)


def fold(events: Iterable[Event], request_id: str | None = None) -> GenerateResult:
    """Fold a stream of events into one result."""
    result = GenerateResult(request_id=request_id)
    text: list[str] = []
    pcm: list[AudioChunk] = []
    actions: list[np.ndarray] = []
    for event in events:
        result.raw.append(event)
        if isinstance(event, TextChunk):
            text.append(event.text)
        elif isinstance(event, ImageChunk):
            result.images.append(event.data)
        elif isinstance(event, AudioChunk):
            pcm.append(event)
        elif isinstance(event, ActionChunk):
            actions.append(event.actions)
        elif isinstance(event, LatentChunk):
            result.latents.append(event.latents)
        result.finish_reason = event.finish_reason or result.finish_reason
        result.usage = event.usage or result.usage
    result.text = "".join(text)
    if pcm:
        result.audio = AudioBuffer(np.concatenate([c.pcm for c in pcm]), pcm[0].sample_rate)
    if actions:
        result.actions = np.concatenate(actions)
    return result
