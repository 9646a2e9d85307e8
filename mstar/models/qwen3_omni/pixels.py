"""Images and frames to the patches that the vision encoder takes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, sqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mstar.models.qwen3_omni.sizes import VisionConfig
from mstar.models.qwen3_omni.vision import Grid
from mstar.models.shrinking import bicubic

__all__ = ["IMAGES", "VIDEOS", "PixelRule", "normalised", "resized", "to_patches"]

_MOST_STRETCHED = 200


@dataclass(frozen=True)
class PixelRule:
    """How large an image, or a frame of a video, may be.

    Args:
        min_pixels, max_pixels: it is enlarged or shrunk to have at least, or at most, so many.
    """

    min_pixels: int
    max_pixels: int

    def size(self, height: int, width: int, unit: int) -> tuple[int, int]:
        """Height and width, multiples of `unit`, that an image is brought to.

        Raises:
            ValueError: it is too long and thin.
        """
        if max(height, width) > _MOST_STRETCHED * min(height, width):
            raise ValueError(
                f"the image is {width} x {height}: one side may be at most {_MOST_STRETCHED} times "
                "the other"
            )
        near = [max(unit, round(side / unit) * unit) for side in (height, width)]
        if near[0] * near[1] > self.max_pixels:
            shrink = sqrt(height * width / self.max_pixels)
            near = [max(unit, floor(side / shrink / unit) * unit) for side in (height, width)]
        elif near[0] * near[1] < self.min_pixels:
            grow = sqrt(self.min_pixels / (height * width))
            near = [ceil(side * grow / unit) * unit for side in (height, width)]
        return near[0], near[1]


IMAGES = PixelRule(3136, 12_845_056)
VIDEOS = PixelRule(128 * 32 * 32, 768 * 32 * 32)


def resized(
    image: Image.Image, rule: PixelRule, config: VisionConfig, device: torch.device | None = None
) -> Image.Image:
    """An RGB image in the size that the rule asks for (bicubic, antialiased; see `bicubic`).

    Raises:
        ValueError: it is too long and thin.
    """
    unit = config.patch_size * config.spatial_merge_size
    height, width = rule.size(image.height, image.width, unit)
    return bicubic(image, (width, height), device)


def to_patches(frames: np.ndarray, config: VisionConfig) -> tuple[Tensor, Grid]:
    """Patches uint8 `[patches, patch_dim]` of frames uint8 `[times, height, width, 3]`.

    Times that are lacking at the end repeat the last frame. The order is: times, blocks of patches
    that become a token, patches of a block; in a patch: colours, times, rows, columns.
    """
    size, merge, times = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    x = torch.from_numpy(np.ascontiguousarray(frames))
    if lacking := -len(x) % times:
        x = torch.cat([x, x[-1:].expand(lacking, -1, -1, -1)])
    x = x.unflatten(0, (-1, times)).unflatten(2, (-1, merge, size)).unflatten(5, (-1, merge, size))
    # time, times, block row, row, y, block column, column, x, colour
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    grid = Grid(x.shape[0], x.shape[1] * merge, x.shape[2] * merge)
    return x.reshape(grid.patches, config.patch_dim), grid


def normalised(patches: Tensor) -> Tensor:
    """Float32, -1 to 1, of bytes."""
    return patches.float().div_(127.5).sub_(1.0)
