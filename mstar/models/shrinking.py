"""Images to another size with Pillow's bicubic filter, on the GPU of a model that has one."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from mstar.engine.kernels.resize import resized_on

__all__ = ["bicubic"]


def bicubic(
    image: Image.Image, size: tuple[int, int], device: torch.device | None = None
) -> Image.Image:
    """An RGB image of another width and height (antialiased).

    Args:
        device: of the model; on a GPU it is resized there.
    """
    if size == image.size:
        return image
    if device is None or device.type != "cuda":
        return image.resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(resized_on(device, np.asarray(image), size[::-1], "bicubic"))
