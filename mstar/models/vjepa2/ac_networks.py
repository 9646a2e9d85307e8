"""The two networks of V-JEPA 2-AC together, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mstar.engine.weights import load, randomize
from mstar.models.vjepa2.ac_config import AcConfig
from mstar.models.vjepa2.ac_predictor import AcPredictor
from mstar.models.vjepa2.encoder import Encoder
from mstar.models.vjepa2.layout import Published
from mstar.models.vjepa2.preprocess import pixels

__all__ = ["AcNetworks", "load_ac_networks"]


class AcNetworks(nn.Module):
    """Encoder and predictor."""

    def __init__(self, config: AcConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.predictor = AcPredictor(config)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.predictor.predictor_norm.weight.device

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Latents `[frames, patches, embed_dim]` of square frames uint8 `[frames, 3, side, side]`,
        each encoded by itself as a clip in which nothing moves, and normed."""
        seen = self.encoder.encode_static(pixels(frames, self.config.img_size))
        return self.predictor.norm(seen)

    def encode_clip(self, frames: Tensor) -> Tensor:
        """Latents `[times, patches, embed_dim]` of frames as one clip, not normed."""
        seen = self.encoder(pixels(frames, self.config.img_size).unsqueeze(0))[0]
        return seen.unflatten(0, (-1, self.config.patches))


def load_ac_networks(
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    config: AcConfig | None = None,
    dummy: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> AcNetworks:
    """Networks with their weights, or with random ones if they are a `dummy`.

    Args:
        config: `AcConfig.from_folder(folder)` if left out.

    Raises:
        WeightsError: a file is missing or wrong, or lacks a tensor.
    """
    with torch.device("meta"):
        networks = AcNetworks(config or AcConfig.from_folder(folder))
    if dummy:
        return randomize(networks, device=device, dtype=dtype).eval()
    checkpoint = Published(folder)
    for network in (networks.encoder, networks.predictor):
        load(network, checkpoint, device=device, dtype=dtype, progress=progress)
    return networks.eval()
