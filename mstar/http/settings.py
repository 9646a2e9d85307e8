"""What the operator of a server can choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from mstar.errors import InvalidRequest

__all__ = ["Settings"]

_ABOVE_0 = (
    *("max_body_mb", "request_timeout", "body_timeout", "max_pixels"),
    *("max_audio_seconds", "max_video_seconds", "max_video_frames"),
)


@dataclass(frozen=True)
class Settings:
    """Names, keys and limits of one server.

    Args:
        served_model_name: what clients may call the model, beside the names of its own; the first
            is shown.
        api_key: clients must send it as `Authorization: Bearer KEY`; `None` lets everybody in.
        max_body_mb: longest request body, or message of a robot, in MiB; all bodies that are being
            served at a time may have eight times as much.
        request_timeout: seconds that any request may take; clients can ask for less. `None` for no
            limit.
        body_timeout: seconds within which a client must have sent the body.
        cors_origins: origins whose pages may call; none by default.
        allow_remote_media: fetch media that requests name by http and https URLs, from public
            addresses only.
        media_dir: a folder whose files requests may name as media.
        max_pixels: most pixels of an image, or of a frame of a video. All media of one request
            together may have four times what one may have, of this and of what follows.
        max_audio_seconds: longest sound.
        max_video_seconds, max_video_frames: longest video.
        robot: whose convention observations on the websocket follow: a name (`"droid"`, `"libero"`,
            `"aloha"`), a `Robot`, or the checkpoint's own.
        default_prompt: the task where an observation has none.
        reset_pose: joints where robots that ask for them begin an episode.

    Raises:
        InvalidRequest: a limit that nothing can keep, or a folder that is not there.
    """

    served_model_name: Sequence[str] = ()
    api_key: str | None = None
    max_body_mb: float = 64
    request_timeout: float | None = 600.0
    body_timeout: float = 60.0
    cors_origins: Sequence[str] = ()
    allow_remote_media: bool = False
    media_dir: str | PathLike | None = None
    max_pixels: int = 2**26
    max_audio_seconds: float = 600.0
    max_video_seconds: float = 600.0
    max_video_frames: int = 36_000
    robot: Any = None
    default_prompt: str | None = None
    reset_pose: Sequence[float] | None = None

    max_text_chars = 200_000  # of one field

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_key", self.api_key or None)
        for name in _ABOVE_0:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidRequest(name, value, "must be above 0")
        if self.media_dir is not None and not Path(self.media_dir).is_dir():
            raise InvalidRequest("media_dir", str(self.media_dir), "is no folder")
        if self.default_prompt is not None and not self.default_prompt.strip():
            raise InvalidRequest("default_prompt", self.default_prompt, "must not be empty")
        if not all(map(math.isfinite, self.reset_pose or ())):
            raise InvalidRequest("reset_pose", list(self.reset_pose), "must be finite numbers")

    @property
    def max_body_bytes(self) -> int:
        """Longest body; also the most bytes of all media that are fetched for one request."""
        return int(self.max_body_mb * 2**20)

    @property
    def max_held_bytes(self) -> int:
        """Most bytes of all bodies that are being read or served."""
        return 8 * self.max_body_bytes
