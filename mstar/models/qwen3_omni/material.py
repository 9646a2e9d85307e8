"""The media of a request: read, and ready for the encoders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mstar.errors import InvalidRequest
from mstar.io.rgb import shown
from mstar.io.sniff import kind_of
from mstar.io.video import read_bytes
from mstar.models.qwen3_omni.config import ThinkerConfig
from mstar.models.qwen3_omni.mel import log_mel
from mstar.models.qwen3_omni.pixels import PixelRule
from mstar.models.qwen3_omni.prompt import Heard, Media, Pictured
from mstar.models.qwen3_omni.sounds import Sound, read_sound, sound_of_video
from mstar.models.qwen3_omni.visuals import (
    Sampling,
    Visual,
    read_picture,
    read_video,
)

__all__ = ["Material", "Reader"]


@dataclass(frozen=True, eq=False)
class Material:
    """One medium: an image, a video, a sound, or a video with its sound.

    Args:
        size: how large the encoders make it.
        visual: what is seen; `None` for a sound.
        sound: what is heard; `None` without sound.
        features: of the sound, once the medium is ready, float32 `[mel bands, frames]`.
        is_video: bool `[tokens]`, see `Segment`.
    """

    size: Media
    visual: Visual | None = None
    sound: Sound | None = None
    features: Tensor | None = None
    is_video: Tensor | None = None

    @property
    def key(self) -> bytes:
        """What the tokens depend on, hashed."""
        parts = [part for part in (self.visual, self.sound) if part is not None]
        return b"".join(type(part).__name__.encode() + part.key for part in parts)

    def ready(self, bands: int, is_video: Tensor | None) -> Material:
        """The same, with what the encoders and the prompt need to know.

        Args:
            bands: of mel features.
        """
        features = None if self.sound is None else log_mel(self.sound.samples, bands)
        return replace(self, features=features, is_video=is_video)


class Reader:
    """Reads media as the parameters of a request ask for it.

    Args:
        device: of the model: images are resized there.
    """

    def __init__(
        self, config: ThinkerConfig, params: dict[str, Any], device: torch.device | None = None
    ) -> None:
        self._config, self._device = config, device
        self._images = PixelRule(params["min_pixels"], params["max_pixels"])
        self._videos = PixelRule(params["video_min_pixels"], params["video_max_pixels"])
        self._sampling = Sampling(params["fps"], params["min_frames"], params["max_frames"])
        self._with_sound = params["use_audio_in_video"]

    def read(self, kind: str, value: Any) -> Material:
        """Open an `"image"`, a `"video"` or `"audio"`.

        A video may be `(frames, sound)`, too: an array or a list of images, and what is heard.

        Raises:
            InvalidRequest: it cannot be read, or served.
        """
        if kind == "image":
            visual = read_picture(value, self._config.vision, self._images, self._device)
            return Material(Pictured(visual.grid), visual)
        if kind == "audio":
            sound = read_sound(value)
            return Material(Heard(self._tokens(sound)), sound=sound)
        frames, beside = value, None
        if isinstance(value, tuple) and len(value) == 2 and _are_frames(value[0]):
            frames, beside = value
        visual = read_video(
            frames, self._config.vision, self._sampling, self._videos, device=self._device
        )
        sound = self._sound_of(frames, beside) if self._with_sound else None
        sounds = 0 if sound is None else self._tokens(sound)
        return Material(Pictured(visual.grid, visual.seconds, sounds), visual, sound)

    def _sound_of(self, video: Any, beside: Any) -> Sound | None:
        """Of a file, or what was given beside frames."""
        if beside is None and _are_frames(video):
            return None
        try:
            if beside is not None:
                return read_sound(beside)
            data = read_bytes(video)
            return None if kind_of(data) == "image" else sound_of_video(data)
        except ValueError as error:
            allowed = f"its sound: {getattr(error, 'allowed', error)}"
            raise InvalidRequest("video", shown(video), allowed) from None

    def _tokens(self, sound: Sound) -> int:
        return self._config.audio.tokens(sound.frames)


def _are_frames(value: Any) -> bool:
    return isinstance(value, (list, Image.Image)) or hasattr(value, "shape")
