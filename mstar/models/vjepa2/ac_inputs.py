"""What callers show a world model, checked in their thread: frames and goals."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from torch import Tensor

from mstar.errors import InvalidRequest
from mstar.io.data_url import decode_data_url
from mstar.io.rgb import rgb_of, shown
from mstar.io.video import open_video
from mstar.models.vjepa2.ac_config import AcConfig
from mstar.models.vjepa2.ac_pixels import squares
from mstar.models.vjepa2.latents import Latents, latents_of
from mstar.models.vjepa2.plan import chosen

__all__ = ["frames_of", "goal_of", "seen_of"]


def frames_of(
    field: str,
    value: Any,
    num_frames: int | None = None,
    first: int | None = None,
    usual: int | None = None,
) -> Tensor:
    """Square frames uint8 `[frames, 3, side, side]` of a video or an image.

    Args:
        num_frames: so many of them, evenly spread.
        first: only so many of those, from the beginning; the others are not decoded.
        usual: the most that are taken from a file, if nobody says; None for all.

    Raises:
        InvalidRequest: it cannot be read, or has too few frames.
    """
    try:
        video = open_video(value)
        in_file = isinstance(value, (str, PathLike, bytes, bytearray, memoryview, tuple))
        places: Sequence[int] = chosen(video, num_frames, None, usual if in_file else None)
        if first is not None and len(places) < first:
            raise ValueError(f"it has {len(places)} frames, of {first} that are needed")
        places = places[:first]
        found = squares(video.images(places))
        if len(found) < len(places):
            raise ValueError(f"it is broken: {len(found)} of {len(places)} frames can be read")
    except InvalidRequest:
        raise
    except ValueError as error:
        raise InvalidRequest(field, shown(value), str(error)) from None
    return found


def seen_of(field: str, value: Any, config: AcConfig) -> Tensor:
    """Frames uint8, or latents `[frames, patches, embed_dim]`, whichever was given.

    Raises:
        InvalidRequest: it is neither.
    """
    if value is None:
        raise InvalidRequest(field, None, "must be given: an image, a video, or latents")
    kind = "float32" if isinstance(value, Latents) else str(getattr(value, "dtype", ""))
    if "float" not in kind and not _nested(value):
        return frames_of(field, value)
    found, patches, width = latents_of(field, value), config.patches, config.embed_dim
    if not found.numel() or found.shape[-1:] != (width,) or found.numel() % (patches * width):
        allowed = f"must be latents [frames, {patches}, {width}]"
        raise InvalidRequest(field, f"array {tuple(found.shape)}", allowed)
    return found.reshape(-1, patches, width)


def goal_of(field: str, value: Any, config: AcConfig) -> Tensor:
    """A goal: frames or latents; see `seen_of`. Strings are data URLs, since clients of a server
    must not name its files: a file is a `pathlib.Path`, or bytes."""
    if isinstance(value, str):
        if not value.startswith("data:"):
            allowed = "a string must be a data URL; give a file as pathlib.Path or bytes"
            raise InvalidRequest(field, value[:80], allowed)
        value = decode_data_url(field, value)
    if field == "goal_image":
        try:
            return squares([rgb_of(value)])
        except ValueError as error:
            raise InvalidRequest(field, shown(value), str(error)) from None
    return seen_of(field, value, config)


def _nested(value: Any) -> bool:
    """Whether it is numbers in lists, as JSON has latents."""
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, float)
