"""Images to what the networks take, and back: colours, sizes, patches, files."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mstar.models.fields import check_fields, check_multiple
from mstar.models.shrinking import bicubic

__all__ = [
    "ResizeRule",
    "new_size",
    "patchify",
    "resized",
    "to_pixels",
    "to_png",
    "to_uint8",
    "unpatchify",
]


_MAX_PIXELS = 14 * 14 * 9 * 1024  # as published, for both kinds of image tokens


@dataclass(frozen=True)
class ResizeRule:
    """To which size an image is brought: sides from `min_size` to `max_size` pixels, multiples of
    `stride`, and at most `max_pixels` in all. Raises ValueError if no image can be."""

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = _MAX_PIXELS

    def __post_init__(self) -> None:
        check_fields(self)
        check_multiple(vars(self), "max_size", self.stride, "the stride")
        if self.min_size > self.max_size:
            raise ValueError(f"min_size={self.min_size}: must not exceed max_size={self.max_size}")
        if self.max_pixels < self.stride**2:
            raise ValueError(f"max_pixels={self.max_pixels}: must hold a square of {self.stride}")


def new_size(rule: ResizeRule, width: int, height: int) -> tuple[int, int]:
    """Width and height that a rule brings an image to; the short side is `min_size` or more if
    `max_size` leaves room for it."""

    def scaled(width: int, height: int, scale: float) -> tuple[int, int]:
        return snapped(round(width * scale)), snapped(round(height * scale))

    def snapped(side: int) -> int:
        return max(rule.stride, round(side / rule.stride) * rule.stride)

    scale = min(rule.max_size / max(width, height), 1.0)
    scale = max(scale, rule.min_size / min(width, height))
    width, height = scaled(width, height, scale)
    if width * height > rule.max_pixels:  # a ratio of areas, for sides: it shrinks more than needed
        width, height = scaled(width, height, rule.max_pixels / (width * height))
    if max(width, height) > rule.max_size:
        width, height = scaled(width, height, rule.max_size / max(width, height))
    return width, height


def resized(
    image: Image.Image, rule: ResizeRule, device: torch.device | None = None
) -> Image.Image:
    """An RGB image in the size that the rule asks for (bicubic, antialiased; see `bicubic`)."""
    return bicubic(image, new_size(rule, *image.size), device)


def to_pixels(image: Image.Image) -> Tensor:
    """Float32 `[3, height, width]`, -1 to 1, of an RGB image."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.contiguous().float().div_(255).sub_(0.5).div_(0.5)


def patchify(x: Tensor, size: int) -> Tensor:
    """Patches `[..., rows * columns, size * size * channels]` of `[..., channels, height, width]`.

    Row by row; in a patch the channel runs fastest, then the column.
    """
    patches = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # c, rows, a, columns, b
    patches = patches.movedim((-4, -2, -3, -1), (-5, -4, -3, -2))
    return patches.flatten(-3).flatten(-3, -2)


def unpatchify(patches: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """`[..., channels, rows * size, columns * size]`: the inverse of `patchify`."""
    x = patches.unflatten(-1, (size, size, -1)).unflatten(-4, (rows, columns))
    x = x.movedim((-1, -5, -3, -4, -2), (-5, -4, -3, -2, -1))
    return x.flatten(-2).flatten(-3, -2)


def to_uint8(pixels: Tensor) -> Tensor:
    """Bytes `[..., height, width, 3]` of `[..., 3, height, width]`, -1 to 1; fractions are cut."""
    levels = (pixels * 0.5 + 0.5).clamp(0, 1) * 255
    return levels.to(torch.uint8).movedim(-3, -1).contiguous()


def to_png(levels: Tensor) -> bytes:
    """A PNG file of bytes `[height, width, 3]`."""
    out = io.BytesIO()
    Image.fromarray(levels.cpu().numpy()).save(out, "PNG", compress_level=1)
    return out.getvalue()
