"""Frames of a robot's camera to pixels, as the planner was trained: no margin, no antialiasing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mstar.models.vjepa2.preprocess import normalise

__all__ = ["pixels", "squares"]


def squares(images: Iterable[Image.Image]) -> Tensor:
    """The squares at the centre of frames of one size, uint8 `[frames, 3, side, side]`.

    Raises:
        ValueError: there are no frames, or their sizes differ.
    """
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
