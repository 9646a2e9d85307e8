"""Latents in and out of the decoder: rectified flow (Liu et al., arXiv 2209.03003) on tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mstar.engine.layers.linear import apply, linear
from mstar.models.bagel.positions import PositionTable

__all__ = ["LatentEmbedder", "TimeEmbedder"]

_FREQUENCIES = 128
_LONGEST = 10000.0  # period of the slowest, in units of 2 pi


class TimeEmbedder(nn.Module):
    """Timesteps -> what is added to latent tokens.

    Sinusoids as those of positions in Vaswani et al. 2017, section 3.5, cosines first, then an MLP.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Rows `[..., hidden]` of timesteps `[...]`, 0 (data) to 1 (noise)."""
        index = torch.arange(_FREQUENCIES, dtype=torch.float32, device=t.device)
        angles = t.float().unsqueeze(-1) * torch.exp(-math.log(_LONGEST) / _FREQUENCIES * index)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class LatentEmbedder(nn.Module):
    """Latent tokens to inputs of the decoder, and its outputs to velocities."""

    def __init__(self, latent_dim: int, hidden_size: int, side: int) -> None:
        super().__init__()
        self.time_embedder = TimeEmbedder(hidden_size)
        self.vae2llm = nn.Linear(latent_dim, hidden_size)
        self.llm2vae = nn.Linear(hidden_size, latent_dim)
        self.latent_pos_embed = PositionTable(side, hidden_size)

    def tokens(self, latents: Tensor, t: Tensor | float, height: int, width: int) -> Tensor:
        """Inputs of the decoder `[..., height * width, hidden]`.

        Args:
            latents: `[..., height * width, latent_dim]`, row by row.
            t: timestep `[...]` of each image, 0 for a clean one.

        Raises:
            ValueError: the image is larger than the table of positions, or not of that size.
        """
        positions = self.latent_pos_embed((height, width))
        if latents.shape[-2] != len(positions):
            raise ValueError(f"{latents.shape[-2]} latent tokens for a grid {height} x {width}")
        weight = self.vae2llm.weight
        if not isinstance(t, Tensor):
            t = torch.full((), t, device=weight.device)  # made there: a copy would be waited for
        x = linear(latents.to(weight.dtype), weight, self.vae2llm.bias)
        return x + (self.time_embedder(t).unsqueeze(-2) + positions)

    def velocity(self, hidden: Tensor) -> Tensor:
        """Velocities float32 `[..., latent_dim]`, noise minus data, of normed hidden states."""
        return apply(self.llm2vae, hidden).float()
