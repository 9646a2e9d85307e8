"""What the nodes around the decoder run: batches of pictures in, batches of pictures out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.engine.kernels.staging import to_device
from mstar.models.bagel.autoencoder import Autoencoder
from mstar.models.bagel.networks import Bagel
from mstar.models.bagel.pictures import Picture
from mstar.models.bagel.pixels import to_png, to_uint8, unpatchify
from mstar.models.bagel.positions import Grid

__all__ = ["Drawn", "decode_runner", "encode_runner", "vision_runner"]


@dataclass(frozen=True, eq=False)
class Drawn:
    """Latents float32 `[tokens, latent_dim]` of an image of `grid` latent tokens."""

    grid: Grid
    latents: Tensor


def vision_runner(
    bagel: Bagel, device: torch.device
) -> Callable[[list[Picture]], list[tuple[Tensor]]]:
    """Pictures -> inputs of the decoder `[patches, hidden]`."""
    dtype = bagel.latents.vae2llm.weight.dtype

    def run(pictures: list[Picture]) -> list[tuple[Tensor]]:
        patches = torch.cat([picture.patches for picture in pictures]).numpy()
        tokens = bagel.image_tokens(
            to_device(patches, torch.float32, device).to(dtype),
            [picture.grid for picture in pictures],
        )
        parts = tokens.split([len(picture.patches) for picture in pictures])
        return [(part.clone() if len(parts) > 1 else part,) for part in parts]

    return run


def encode_runner(
    autoencoder: Autoencoder, device: torch.device
) -> Callable[[list[Picture]], list[tuple[Tensor, Tensor]]]:
    """Pictures of one size -> mean and log-variance of their latents, each `[z, height, width]`."""

    def run(pictures: list[Picture]) -> list[tuple[Tensor, Tensor]]:
        pixels = torch.stack([picture.pixels for picture in pictures]).numpy()
        mean, logvar = autoencoder.encode(to_device(pixels, torch.float32, device))
        return [(m.clone(), v.clone()) for m, v in zip(mean, logvar, strict=True)]

    return run


def decode_runner(autoencoder: Autoencoder, patch: int) -> Callable[[list[Drawn]], list[bytes]]:
    """Latents of one grid -> PNG files."""

    def run(drawn: list[Drawn]) -> list[bytes]:
        latents = torch.stack([image.latents for image in drawn])
        pixels = autoencoder.decode(unpatchify(latents, *drawn[0].grid, patch))
        return [to_png(levels) for levels in to_uint8(pixels)]

    return run
