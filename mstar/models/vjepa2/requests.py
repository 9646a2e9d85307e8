"""A request, laid out in the caller's thread: its frames, and the tokens that it names.

Whatever is missing, or does not fit, raises InvalidRequest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mstar.errors import InvalidRequest
from mstar.io.rgb import shown
from mstar.io.video import Video, open_video
from mstar.models.base import Inputs
from mstar.models.parameters import demand

__all__ = ["Asked", "Masks", "Seen", "frames_of", "masks_of", "still_or_clip"]

_MOST_FRAMES = 1024
_LONGEST = 3600.0  # seconds of a file


@dataclass(frozen=True, eq=False)
class Masks:
    """Which tokens the predictor sees, and which it predicts: int64 `[tokens]`, on the CPU."""

    context: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """What one call of the encoder looks at.

    Args:
        frames: uint8 `[frames, 3, crop, crop]`.
        ids: only these tokens, int64 `[tokens]`.
    """

    frames: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """One call of the predictor: context `[context, hidden]` and the numbers of its tokens and of
    those to predict, int64 `[context]` and `[targets]`."""

    context: Tensor
    context_ids: Tensor
    target_ids: Tensor


def still_or_clip(inputs: Inputs) -> tuple[str, Any]:
    """The field that holds the one clip of a request, and what it holds: several images are the
    frames of a clip; a single one stands still."""
    both = bool(inputs.images and inputs.video)
    demand(not both, "images", f"{len(inputs.images)} images", "give images or a video")
    field = "images" if inputs.images else "video"
    values = list(getattr(inputs, field))
    demand(bool(values), "video", None, "nothing was given")
    return field, values[0] if len(values) == 1 else values


def frames_of(
    field: str,
    value: Any,
    crop: Callable[[Iterable[Image.Image]], Tensor],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    usual: int | None = None,
    tubelet: int = 1,
    first: int | None = None,
) -> Tensor:
    """Frames uint8 `[frames, 3, side, side]` of a video or an image.

    Args:
        field: to name in errors.
        value: see `open_video`.
        crop: makes frames of images; raises ValueError where it cannot.
        num_frames, fps: see `_chosen`.
        usual: the most frames that are taken from a file, if nobody says; None for all.
        tubelet: a video must have as many frames; images need not.
        first: only so many of the frames, from the beginning; the others are not decoded.
    """
    if isinstance(value, list) and any(getattr(item, "ndim", 0) == 4 for item in value):
        allowed = "one clip a request; generate_batch takes several requests"
        raise InvalidRequest(field, f"{len(value)} clips", allowed)
    told = f"{len(value)} frames" if isinstance(value, list) else shown(value)
    try:
        video = open_video(value, _LONGEST)
        in_file = isinstance(value, (str, PathLike, bytes, bytearray, memoryview, tuple))
        places = _chosen(video, num_frames, fps, usual if in_file else None)
        if first is not None and len(places) < first:
            raise ValueError(f"it has {len(places)} frames, of {first} that are needed")
        places = places[:first]
        if len(places) > _MOST_FRAMES:
            raise ValueError(f"{len(places)} frames of at most {_MOST_FRAMES}; set num_frames")
        if field == "video" and len(places) < tubelet:
            raise ValueError(
                f"it has {len(places)} of the {tubelet} frames of a tubelet; "
                "a frame that stands still goes into images"
            )
        frames = crop(video.images(places))
        if len(frames) < len(places):
            raise ValueError(f"it is broken: {len(frames)} of {len(places)} frames can be read")
    except InvalidRequest:
        raise
    except ValueError as error:
        raise InvalidRequest(field, told, str(error)) from None
    return frames


def _chosen(
    video: Video, num_frames: int | None, fps: float | None, usual: int | None
) -> Sequence[int]:
    """The frames that are taken, evenly from the first on, as published: so many, or so many of a
    second, or at most the usual number. Raises ValueError if there are none."""
    if not video.count:
        raise ValueError("it has no frames")
    if fps is not None:
        known = video.fps is not None
        demand(known, "fps", fps, "only files of videos say how long a frame is shown")
        count = max(1, int(video.count / video.fps * fps))
    else:
        count = num_frames or min(video.count, usual or video.count)
    given = ("num_frames", num_frames) if fps is None else ("fps", fps)
    demand(count <= video.count, *given, f"there are {video.count} frames")
    return [k * video.count // count for k in range(count)]


def masks_of(params: Mapping[str, Any], tokens: int, end: int) -> Masks | None:
    """The masks that were given, checked against a clip of so many tokens; targets may lie behind
    it, up to `end`."""
    if params["context_mask"] is None:
        return None
    limits = {"context_mask": tokens, "target_mask": end}
    for field, limit in limits.items():
        ids = params[field]
        allowed = f"{ids.max()} is out of range; the clip has the tokens 0 to {tokens - 1}"
        if field == "target_mask":
            allowed += f", and its future ends with {end - 1}"
        demand(ids.max() < limit, field, f"{len(ids)} tokens", allowed)
        demand(len(ids) <= limit, field, f"{len(ids)} tokens", f"must be at most {limit}")
    return Masks(*(torch.from_numpy(params[field]) for field in limits))
