"""Images and videos of a request: from whatever was given to patches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mstar.errors import InvalidRequest
from mstar.io.rgb import rgb_of, shown
from mstar.io.video import open_video
from mstar.models.qwen3_omni.pixels import IMAGES, VIDEOS, PixelRule, resized, to_patches
from mstar.models.qwen3_omni.sizes import VisionConfig
from mstar.models.qwen3_omni.vision import Grid

__all__ = ["Sampling", "Visual", "read_picture", "read_video", "sampled"]

_LONGEST = 3600.0  # seconds


@dataclass(frozen=True, eq=False)
class Visual:
    """An image or a video.

    Args:
        key: hash of its pixels.
        patches: uint8 `[patches, patch_dim]`; `pixels.normalised` makes them what the encoder
            takes.
        grid: patches in time, down and across.
        seconds: of a video, from one time of the grid to the next.
    """

    key: bytes
    patches: Tensor
    grid: Grid
    seconds: float | None = None


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are seen.

    Args:
        fps: frames of a second.
        min_frames, max_frames: at least and at most so many, if there are as many.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768


def sampled(count: int, fps: float, sampling: Sampling) -> tuple[list[int], float]:
    """Which of `count` frames are taken, an even number of them, and how many that is in a second.

    Args:
        fps: frames of a second that there are.
    """
    wanted = count / fps * sampling.fps
    least, most = -(-sampling.min_frames // 2) * 2, sampling.max_frames // 2 * 2
    taken = int(min(max(wanted, least), max(most, 2), count)) // 2 * 2
    if taken < 2:
        return [0] * min(count, 1), sampling.fps
    as_asked = taken == int(wanted) // 2 * 2
    places = np.linspace(0, count - 1, taken).round().astype(int).tolist()
    return places, sampling.fps if as_asked else taken / count * fps


def read_picture(
    value: Any,
    config: VisionConfig,
    rule: PixelRule = IMAGES,
    device: torch.device | None = None,
) -> Visual:
    """Open and resize an image.

    Args:
        value: a path, bytes, `(filename, bytes)`, a PIL image or an array `[height, width(, 3)]`.
        device: see `bicubic`.

    Raises:
        InvalidRequest: it is not an image, a broken one, or one that is too long and thin.
    """
    try:
        frame = np.array(resized(rgb_of(value), rule, config, device))
    except ValueError as error:
        raise InvalidRequest("images", shown(value), str(error)) from None
    return _visual(frame[None], config, None)


def read_video(
    value: Any,
    config: VisionConfig,
    sampling: Sampling | None = None,
    rule: PixelRule = VIDEOS,
    longest: float = _LONGEST,
    device: torch.device | None = None,
) -> Visual:
    """Open a video, choose frames and resize them.

    Args:
        value: see `open_video`. The frames of an array, of a list of images and of an animation
            are chosen already, `sampling.fps` a second.
        longest: seconds, refused beyond that.

    Raises:
        InvalidRequest: it is not a video, a broken one, or none that can be served.
    """
    sampling = sampling or Sampling()
    try:
        video = open_video(value, longest)
        places, fps = None, sampling.fps
        if video.fps is not None:
            places, fps = sampled(video.count, video.fps, sampling)
        elif video.count > (most := sampling.max_frames):
            raise ValueError(f"it has {video.count} frames, and at most {most} are seen")
        images = video.images(places)
        frames = [np.asarray(resized(image, rule, config, device)) for image in images]
        if not frames:
            raise ValueError("it has no frames")
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError("its frames are of several sizes")
    except ValueError as error:
        allowed = str(error)
    else:
        return _visual(np.stack(frames), config, config.temporal_patch_size / fps)
    raise InvalidRequest("video", shown(value), allowed)


def _visual(frames: np.ndarray, config: VisionConfig, seconds: float | None) -> Visual:
    digest = hashlib.blake2b(np.ascontiguousarray(frames).data, digest_size=16)
    digest.update(f"{frames.shape} {seconds}".encode())
    patches, grid = to_patches(frames, config)
    return Visual(digest.digest(), patches, grid, seconds)
