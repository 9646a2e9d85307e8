"""The two published ways to fit a camera's image into the square that the model sees.

Both keep its shape, centre it and pad it with black. lerobot samples it bilinearly as it is; the
server of openpi uses Pillow, which filters first where an image shrinks.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

__all__ = ["RULES", "fitted", "resize_lerobot", "resize_openpi"]

RULES = ("lerobot", "openpi")


def fitted(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """Height and width that an image gets, and the rows and columns of padding before it."""
    ratio = max(size[1] / target[1], size[0] / target[0])
    height, width = (max(1, int(side / ratio)) for side in size)
    return height, width, (target[0] - height) // 2, (target[1] - width) // 2


def resize_lerobot(image: Tensor, target: tuple[int, int]) -> Tensor:
    """Float32 `[3, height, width]`, -1 to 1, of bytes or of floats from 0 to 1, on any device."""
    x = image.float().div_(255) if image.dtype == torch.uint8 else image.float()
    if x.shape[1:] == target:
        return x * 2 - 1
    height, width, top, left = fitted(tuple(x.shape[1:]), target)
    x = F.interpolate(x.unsqueeze(0), (height, width), mode="bilinear", align_corners=False)[0]
    out = x.new_full((3, *target), -1.0)
    out[:, top : top + height, left : left + width] = x.clamp_(0, 1).mul_(2).sub_(1)
    return out


def resize_openpi(image: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    """Bytes `[height, width, 3]` of such bytes."""
    if image.shape[:2] == target:
        return image
    height, width, top, left = fitted(image.shape[:2], target)
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    out = np.zeros((*target, 3), np.uint8)
    out[top : top + height, left : left + width] = small
    return out
