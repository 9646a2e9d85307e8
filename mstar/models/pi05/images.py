"""Camera images as programs hold them: numpy, torch or PIL, bytes or floats, colours first or last.

Three rows of an image whose last dimension is 3 as well are taken for its colours, as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mstar.errors import InvalidRequest
from mstar.io.rgb import to_rgb
from mstar.models.pi05.resize import fit_lerobot, fit_openpi, sampled

__all__ = ["image_faults", "model_images"]


_FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
_NEAR = 1.001e-3  # as floats round it


def model_images(images: Mapping[str, Any], target: tuple[int, int], rule: str) -> Tensor:
    """What the vision tower takes: float32 `[images, 3, height, width]`, -1 to 1.

    Args:
        images: where an image came from, for messages -> `[height, width, 3]` or `[3, height,
            width]`, of any size, with or without a batch dimension of 1; bytes, or floats from 0
            to 1 (what sums leave beside that, up to 1e-3, is clipped); or a PIL image.
        target: height and width that the model takes.
        rule: of `resize.RULES`.

    Raises:
        InvalidRequest: one is no such image.
    """
    found = [_checked(field, image) for field, image in images.items()]
    device = next((image.device for image in found if isinstance(image, Tensor)), None)
    if device is not None and rule == "lerobot":
        return torch.stack([sampled(_on(image, device), target) for image in found])
    out = torch.empty(len(found), 3, *target)
    fit = fit_lerobot if rule == "lerobot" else fit_openpi
    for image, pixels in zip(found, out.numpy(), strict=True):
        fit(image.cpu().numpy() if isinstance(image, Tensor) else image, pixels)
    return out


def image_faults(field: str, image: Any) -> list[str]:
    """What is wrong with an image, in words; files are not looked into."""
    if isinstance(image, (str, PathLike, bytes, bytearray, memoryview, tuple)):
        return []
    try:
        _checked(field, image)
    except InvalidRequest as error:
        return [str(error)]
    return []


def _checked(field: str, image: Any) -> np.ndarray | Tensor:
    """Bytes or float32 `[3, height, width]`; a view where possible, and a tensor on a GPU only."""
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if isinstance(image, Tensor) and image.layout == torch.strided and not image.is_meta:
        fits = image.dtype == torch.uint8 or image.dtype in _FLOATS
        image = image.detach()
        if fits and image.device.type == "cpu":
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    elif isinstance(image, np.ndarray) and image.dtype.kind in "biufc":
        fits = image.dtype == np.uint8 or image.dtype.kind == "f"
    else:
        raise InvalidRequest(field, type(image).__name__, "must be an array or an image")
    shape = list(image.shape)
    while image.ndim > 3 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[-1]) or 0 in image.shape:
        raise InvalidRequest(field, shape, "must be [height, width, 3] or [3, height, width]")
    if image.shape[0] != 3:
        image = image.swapaxes(0, 2).swapaxes(1, 2)
    if not fits:
        raise InvalidRequest(field, str(image.dtype), "must be uint8, or floats from 0 to 1")
    if image.dtype in (np.uint8, torch.uint8):
        return image
    with np.errstate(over="ignore"):  # it is refused below
        image = image.float() if isinstance(image, Tensor) else image.astype(np.float32, copy=False)
    low, high = float(image.min()), float(image.max())
    if not (low >= -_NEAR and high <= 1 + _NEAR):
        raise InvalidRequest(field, f"{low:g} to {high:g}", "floats must be from 0 to 1")
    return image if low >= 0 and high <= 1 else image.clip(0, 1)


def _on(image: np.ndarray | Tensor, device: torch.device) -> Tensor:
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image))
    return image.to(device)
