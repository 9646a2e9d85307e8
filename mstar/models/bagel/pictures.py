"""Images of a request: from whatever was given to what the encoders take."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mstar.errors import InvalidRequest
from mstar.io.rgb import rgb_of, shown
from mstar.models.bagel.config import BagelConfig
from mstar.models.bagel.pixels import patchify, resized, to_pixels
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


def read_picture(
    value: Any, config: BagelConfig, *, draws: bool, device: torch.device | None = None
) -> Picture:
    """Open and resize an image: always for the autoencoder first, as the published code does.

    Args:
        value: a path, bytes, `(filename, bytes)`, a PIL image or an array `[height, width(, 3)]`.
        draws: whether the autoencoder will want it.
        device: see `bicubic`.
    """
    try:
        image = resized(rgb_of(value), config.vae_rule, device)
    except ValueError as error:
        raise InvalidRequest("images", shown(value), str(error)) from None
    size = config.vit.patch_size
    small = resized(image, config.vit_rule, device)
    patches = patchify(to_pixels(small), size)
    digest = hashlib.blake2b(np.asarray(image).tobytes(), digest_size=16)
    digest.update(f"{image.size}".encode())
    return Picture(
        key=digest.digest(),
        size=(image.height, image.width),
        pixels=to_pixels(resized(image, config.vae_rule, device)) if draws else None,
        patches=patches,
        grid=(small.height // size, small.width // size),
    )
