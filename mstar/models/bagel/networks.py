"""The networks of a checkpoint: ema.safetensors holds the model, ae.safetensors the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mstar.engine.checkpoint import Checkpoint
from mstar.engine.weights import Source
from mstar.errors import WeightsError
from mstar.models.bagel.autoencoder import Autoencoder
from mstar.models.bagel.config import BagelConfig
from mstar.models.bagel.decoder import Decoder
from mstar.models.bagel.embedders import LatentEmbedder
from mstar.models.bagel.positions import Grid, PositionTable
from mstar.models.bagel.vit import Connector, VisionEncoder
from mstar.models.base import filled

__all__ = ["Bagel", "load_networks", "networks"]

_TABLE = "latent_pos_embed.pos_embed"
# Our modules -> where their parameters are in ema.safetensors.
_PREFIXES = {
    "decoder": "language_model.",
    "vit": "vit_model.vision_model.",
    "connector": "connector.",
    "patch_positions": "vit_pos_embed.",
    "latents": "",
}


class Bagel(nn.Module):
    """Everything but the autoencoder; `side` latent tokens are along the sides of the table of
    positions."""

    def __init__(self, config: BagelConfig, side: int) -> None:
        super().__init__()
        self.config = config
        self.side = side
        hidden, patches = config.llm.hidden_size, config.vit_max_num_patch_per_side
        self.decoder = Decoder(config.llm)
        self.vit = VisionEncoder(config.vit, patches)
        self.connector = Connector(config.vit.hidden_size, hidden)
        self.patch_positions = PositionTable(patches, hidden)
        self.latents = LatentEmbedder(config.patch_latent_dim, hidden, side)

    def sources(self, name: str) -> Sequence[Source]:
        module, path = name.split(".", 1)
        own = getattr(getattr(self, module), "sources", None)
        found = (Source((path,)),) if own is None else own(path)
        prefix = _PREFIXES[module]
        return [replace(s, names=tuple(prefix + each for each in s.names)) for s in found]

    def image_tokens(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Inputs of the decoder `[patches, hidden]` for what images show; see `VisionEncoder`."""
        features = self.connector(self.vit(patches, grids))
        places = [self.patch_positions(grid) for grid in grids]
        return features + (places[0] if len(places) == 1 else torch.cat(places))

    def latent_tokens(self, latents: Tensor, t: Tensor | float, height: int, width: int) -> Tensor:
        """See `LatentEmbedder.tokens`."""
        return self.latents.tokens(latents, t, height, width)

    def velocity(self, hidden: Tensor) -> Tensor:
        """Velocities float32 `[..., latent_dim]` of what the decoder's last layer left of latent
        tokens that led their span, `[..., hidden]`."""
        return self.latents.velocity(self.decoder.norm_lead(hidden))


def networks(folder: Path) -> tuple[Bagel, Autoencoder]:
    """The networks that the files in `folder` describe, without weights, on "meta". Where there is
    no ema.safetensors, its tables have room for the largest image that is allowed.

    Raises:
        WeightsError: a config is missing or wrong.
    """
    try:
        config = BagelConfig.from_folder(folder)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no {error.filename}") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot use the configs in {folder}: {error}") from error
    needed = config.vae_rule.max_size // config.latent_downsample
    file = folder / "ema.safetensors"
    side = _side(file) if file.exists() else needed
    if side < needed:
        why = f"positions for {side} x {side} latent tokens, and images may be {needed} long"
        raise WeightsError(f"{file}: {_TABLE} has {why}")
    with torch.device("meta"):
        return Bagel(config, side), Autoencoder(config.vae)


def load_networks(folder: Path, **how: Any) -> tuple[Bagel, Autoencoder]:
    """The networks as `filled` has them, but for the autoencoder, which is always float32."""
    bagel, autoencoder = networks(folder)
    exact = {**how, "dtype": torch.float32}
    filled(autoencoder, lambda: _open(folder / "ae.safetensors"), **exact)  # the small one first
    return filled(bagel, lambda: _open(folder / "ema.safetensors"), **how), autoencoder


def _open(file: Path) -> Checkpoint:
    if not file.exists():
        raise WeightsError(f"there is no {file}")
    return Checkpoint.open(file)


def _side(file: Path) -> int:
    """Latent tokens along the sides of the table; the config.json that is published is wrong."""
    checkpoint = _open(file)
    if _TABLE not in checkpoint:
        raise WeightsError(f"{file} lacks {_TABLE}")
    rows = checkpoint.shape(_TABLE)[0]
    side = isqrt(rows)
    if side**2 != rows or not side:
        raise WeightsError(f"{file}: {_TABLE} has {rows} rows, and they must be a square")
    return side
