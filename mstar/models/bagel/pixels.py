"""Images to what the networks take, and back: colours, sizes, patches, files."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mstar.models.bagel.resize import ResizeRule, new_size

__all__ = [
    "patchify",
    "resized",
    "to_pixels",
    "to_png",
    "to_uint8",
    "unpatchify",
]


def resized(image: Image.Image, rule: ResizeRule) -> Image.Image:
    """An RGB image in the size that the rule asks for (bicubic, antialiased)."""
    size = new_size(rule, *image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


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
