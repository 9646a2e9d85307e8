"""Camera images as programs hold them: numpy, torch or PIL, bytes or floats, colours first or last.

Three rows of an image whose last dimension is 3 as well are taken for its colours, as published.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mstar.errors import InvalidRequest
from mstar.io.rgb import to_rgb
from mstar.models.pi05.resize import resize_lerobot, resize_openpi

__all__ = ["image_faults", "model_image"]


_FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
_NEAR = 1.001e-3  # as floats round it


def model_image(field: str, image: Any, target: tuple[int, int], rule: str) -> Tensor:
    """What the vision tower takes: float32 `[3, height, width]`, -1 to 1.

    Args:
        field: where it came from, for messages.
        image: `[height, width, 3]` or `[3, height, width]`, of any size, with or without a batch
            dimension of 1; bytes, or floats from 0 to 1 (what sums leave beside that, up to 1e-3,
            is clipped); or a PIL image.
        target: height and width that the model takes.
        rule: of `resize.RULES`.

    Raises:
        InvalidRequest: it is no such image.
    """
    found = _checked(field, image)
    if rule == "lerobot":
        return resize_lerobot(found, target)
    if found.dtype != torch.uint8:
        found = (255 * found.float()).to(torch.uint8)
    pixels = resize_openpi(found.permute(1, 2, 0).contiguous().cpu().numpy(), target)
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255).mul_(2).sub_(1)


def image_faults(field: str, image: Any) -> list[str]:
    """What is wrong with an image, in words; files are not looked into."""
    if isinstance(image, (str, PathLike, bytes, bytearray, memoryview, tuple)):
        return []
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = torch.empty(image.shape, dtype=torch.uint8)  # only its shape can be wrong
    try:
        _checked(field, image)
    except InvalidRequest as error:
        return [str(error)]
    return []


def _checked(field: str, image: Any) -> Tensor:
    """Bytes or floats `[3, height, width]`; a view where possible."""
    if isinstance(image, Image.Image):
        image = np.array(to_rgb(image))
    if isinstance(image, np.ndarray) and image.dtype != object:
        image = _from_numpy(image)
    if not isinstance(image, Tensor) or image.layout != torch.strided or image.is_meta:
        raise InvalidRequest(field, type(image).__name__, "must be an array or an image")
    image = image.detach()
    shape = list(image.shape)
    while image.ndim > 3 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[-1]) or not image.numel():
        raise InvalidRequest(field, shape, "must be [height, width, 3] or [3, height, width]")
    if image.shape[0] != 3:
        image = image.permute(2, 0, 1)
    if image.dtype == torch.uint8:
        return image
    if image.dtype not in _FLOATS:
        raise InvalidRequest(field, str(image.dtype), "must be uint8, or floats from 0 to 1")
    low, high = torch.stack(image.aminmax()).tolist()
    if not (low >= -_NEAR and high <= 1 + _NEAR):
        raise InvalidRequest(field, f"{low:g} to {high:g}", "floats must be from 0 to 1")
    return image if low >= 0 and high <= 1 else image.clamp(0, 1)


def _from_numpy(image: np.ndarray) -> Any:
    if any(stride < 0 for stride in image.strides) or not image.flags.writeable:
        image = image.copy()  # flipped, or a view of a message: torch takes neither
    try:
        return torch.from_numpy(image.astype(image.dtype.newbyteorder("="), copy=False))
    except TypeError:
        return image
