"""What the operator of a server can choose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Names, keys and limits of one server.

    Args:
        names: what the model is called on the wire; the first one is shown.
        api_key: clients must send it as `Authorization: Bearer KEY`; `None` lets everybody in.
        max_body_bytes: longest request body.
        max_text_chars: longest text in one field.
        body_timeout: seconds within which a client must have sent the body.
        request_timeout: seconds that any request may take; clients can ask for less.
        cors_origins: origins whose pages may call; none by default.
        allow_remote_media: fetch media that requests name by http and https URLs, from public
            addresses only.
        media_dir: a folder whose files requests may name as media.
        max_pixels: most pixels of an image, or of a frame of a video.
        max_audio_seconds: longest sound.
        max_video_seconds, max_video_frames: longest video.
    """

    names: tuple[str, ...]
    api_key: str | None = None
    max_body_bytes: int = 64 * 2**20
    max_text_chars: int = 200_000
    body_timeout: float = 60.0
    request_timeout: float | None = 600.0
    cors_origins: tuple[str, ...] = ()
    allow_remote_media: bool = False
    media_dir: Path | None = None
    max_pixels: int = 2**26
    max_audio_seconds: float = 600.0
    max_video_seconds: float = 600.0
    max_video_frames: int = 36_000

    @property
    def max_media_bytes(self) -> int:
        """Most bytes of all media that are fetched for one request: as many as it may send."""
        return self.max_body_bytes
