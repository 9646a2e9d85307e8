"""Frames to pixels as published: resized and cropped in 8 bits, normalised on the device; for the
planner, squares that are resized there, without a margin and without antialiasing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mstar.engine.kernels.resize import resized_on
from mstar.models.fields import check_fields, read_object

__all__ = ["PixelRule", "cropped", "normalise", "pixel_rule", "pixels", "squares"]

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as published
_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PixelRule:
    """How frames become pixels: the shorter side is brought to `shortest` pixels, and a square of
    `crop` is kept; `mean` and `std` of the colours are in units of full brightness. Raises
    ValueError if nothing can be cropped like that."""

    crop: int
    shortest: int
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD

    def __post_init__(self) -> None:
        check_fields(self)
        if self.shortest < self.crop:
            raise ValueError(f"shortest={self.shortest}: must hold the crop of {self.crop}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise ValueError(f"mean={self.mean}, std={self.std}: must be of three colours")


def pixel_rule(crop: int, file: Path | None = None) -> PixelRule:
    """The rule for crops of some size, with what a video_preprocessor_config.json says instead.
    Raises OSError or ValueError."""
    given = read_object(file) if file is not None and file.is_file() else {}
    size = given.get("size") or {}
    sides = given.get("crop_size") or crop
    if isinstance(sides, Mapping):
        if sides.get("height") != sides.get("width"):
            raise ValueError(f"crop_size={dict(sides)}: must be a square")
        sides = sides.get("height")
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else size
    return PixelRule(
        sides,
        int(crop * 256 / 224) if shortest is None else shortest,
        tuple(given.get("image_mean") or _MEAN),
        tuple(given.get("image_std") or _STD),
    )


def cropped(
    images: Iterable[Image.Image], rule: PixelRule, device: torch.device | None = None
) -> Tensor:
    """Frames uint8 `[frames, 3, crop, crop]`: resized (bilinear, antialiased, the longer side
    truncated; on a GPU, if that is the device), then cropped at the centre."""
    frames = [_cropped(np.array(image), rule, device) for image in images]
    return torch.stack(frames) if frames else torch.empty(0, 3, rule.crop, rule.crop)


def _cropped(frame: np.ndarray, rule: PixelRule, device: torch.device | None) -> Tensor:
    x = torch.from_numpy(frame).permute(2, 0, 1)
    short, long = sorted(x.shape[1:])
    if short != rule.shortest:
        long = int(rule.shortest * long / short)
        tall = x.shape[1] > x.shape[2]
        size = (long, rule.shortest) if tall else (rule.shortest, long)
        if device is not None and device.type == "cuda":
            frame = resized_on(device, frame, size, "bilinear", "torch")
            x = torch.from_numpy(frame).permute(2, 0, 1)
        else:
            x = F.interpolate(x[None], size=size, mode="bilinear", antialias=True)[0]
    top, left = ((side - rule.crop) // 2 for side in x.shape[1:])
    return x[:, top : top + rule.crop, left : left + rule.crop]


def normalise(
    frames: Tensor, mean: tuple[float, ...] = _MEAN, std: tuple[float, ...] = _STD
) -> Tensor:
    """Pixels float32 of frames `[..., 3, height, width]`, 0 to 255, on their device."""
    shift, scale = _colours(mean, std, frames.device)
    return (frames.float() - shift) / scale


def squares(images: Iterable[Image.Image]) -> Tensor:
    """The squares at the centre of frames of one size, uint8 `[frames, 3, side, side]`. Raises
    ValueError if there are no frames, or their sizes differ."""
    found = []
    for image in images:
        height, width = image.height, image.width
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        found.append(np.array(image)[top : top + side, left : left + side])
    if len({frame.shape for frame in found}) != 1:
        raise ValueError("frames differ in size" if found else "there are no frames")
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def pixels(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Normalised pixels float32 `[frames, 3, height, width]` of frames uint8, on their device."""
    x = frames.float()
    if x.shape[-2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return normalise(x)


@lru_cache(maxsize=16)
def _colours(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    both = torch.tensor([mean, std], dtype=torch.float32, device=device).mul_(255)
    return both[0].view(3, 1, 1), both[1].view(3, 1, 1)
