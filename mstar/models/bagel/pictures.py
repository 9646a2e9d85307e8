"""Images of a request: from whatever was given to what the encoders take."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mstar.errors import InvalidRequest
from mstar.models.bagel.config import BagelConfig
from mstar.models.bagel.pixels import open_image, patchify, resized, to_pixels, to_rgb
from mstar.models.bagel.positions import Grid

__all__ = ["Picture", "read_picture"]


@dataclass(frozen=True, eq=False)
class Picture:
    """An image, resized for both encoders.

    Args:
        key: hash of its pixels.
        size: height and width for the autoencoder; an edit comes out in it.
        pixels: for the autoencoder, float32 `[3, height, width]`; `None` where nothing is drawn.
        patches: for the vision encoder, float32 `[patches, patch_dim]`.
        grid: patches down and across.
    """

    key: bytes
    size: tuple[int, int]
    pixels: Tensor | None
    patches: Tensor
    grid: Grid


def read_picture(value: Any, config: BagelConfig, *, draws: bool) -> Picture:
    """Open and resize an image: always for the autoencoder first, as the published code does.

    Args:
        value: a path, bytes, `(filename, bytes)`, a PIL image or an array `[height, width(, 3)]`.
        draws: whether the autoencoder will want it.

    Raises:
        InvalidRequest: it is not an image, or a broken one.
    """
    try:
        image = resized(_opened(value), config.vae_rule)
    except ValueError as error:
        raise InvalidRequest("images", _shown(value), str(error)) from None
    size = config.vit.patch_size
    small = resized(image, config.vit_rule)
    patches = patchify(to_pixels(small), size)
    digest = hashlib.blake2b(np.asarray(image).tobytes(), digest_size=16)
    digest.update(f"{image.size}".encode())
    return Picture(
        key=digest.digest(),
        size=(image.height, image.width),
        pixels=to_pixels(resized(image, config.vae_rule)) if draws else None,
        patches=patches,
        grid=(small.height // size, small.width // size),
    )


def _opened(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, (str, PathLike)):
        try:
            return open_image(Path(value).read_bytes())
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value = value[1]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return open_image(bytes(value))
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return to_rgb(_of_array(value))
    raise ValueError("must be a path, bytes, (filename, bytes), a PIL image or an array")


def _of_array(value: np.ndarray) -> Image.Image:
    flat = value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (3, 4))
    if value.dtype != np.uint8 or not flat or not value.size:
        raise ValueError("an array must be uint8 [height, width] or [height, width, 3 or 4]")
    return Image.fromarray(value)


def _shown(value: Any) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    if isinstance(value, (tuple, list)) and value:
        return str(value[0])[:80]
    shape = getattr(value, "shape", None)
    return str(value)[:80] if shape is None else f"array {tuple(shape)} {value.dtype}"
