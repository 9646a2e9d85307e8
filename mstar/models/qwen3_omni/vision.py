"""The vision encoder: patches of images and videos -> rows for the Thinker (Qwen3-VL, arXiv
2511.21631, section 2).

A learned table of positions, resampled to the image, and rotary positions in two dimensions. The
pictures of a video (pairs of frames) do not see each other here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.layers.linear import apply
from mstar.engine.layers.packed import packed_attention
from mstar.engine.layers.residual import normed
from mstar.engine.layers.rotary import rotate
from mstar.engine.weights import Source
from mstar.models.qwen3_omni.sizes import VisionConfig

__all__ = ["Grid", "Seen", "VisionEncoder"]


class Grid(NamedTuple):
    """Patches of an image or a video: in time, down and across."""

    times: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """In all."""
        return self.times * self.height * self.width


class Seen(NamedTuple):
    """What the encoder makes of images.

    Args:
        rows: `[tokens, out_hidden]`.
        features: for the decoder's first layers, each like the rows.
        hidden: what the last layer left, `[patches, hidden]`.
    """

    rows: Tensor
    features: tuple[Tensor, ...]
    hidden: Tensor


class _Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], lengths: Sequence[int]) -> Tensor:
        q, k, v = apply(self.qkv, x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        seen = packed_attention(rotate(q, *angles), rotate(k, *angles), v, lengths)
        return apply(self.proj, seen.flatten(1))


class _MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.linear_fc2, F.gelu(apply(self.linear_fc1, x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, 1e-6)
        self.attn = _Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, 1e-6)
        self.mlp = _MLP(config)

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        angles: tuple[Tensor, Tensor],
        lengths: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """What leaves is the residual stream and what is still to be added to it; what comes too,
        so that a norm takes the addition along."""
        h, x = normed(self.norm1, x, added)
        h, x = normed(self.norm2, self.attn(h, angles, lengths), x)
        return x, self.mlp(h)


class _Merger(nn.Module):
    """Neighbouring patches to one token.

    Args:
        late: whether patches are put together before the norm.
    """

    def __init__(self, config: VisionConfig, *, late: bool) -> None:
        super().__init__()
        self.size = config.merged * config.hidden_size
        self.ln_q = nn.LayerNorm(self.size if late else config.hidden_size, 1e-6)
        self.mlp = nn.ModuleDict(  # 1 is the activation
            {
                "0": nn.Linear(self.size, self.size),
                "2": nn.Linear(self.size, config.out_hidden_size),
            }
        )
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        if self.late:
            x = x.view(-1, self.size)
        x = self.ln_q(x).view(-1, self.size)
        return apply(self.mlp["2"], F.gelu(apply(self.mlp["0"], x)))


class VisionEncoder(nn.Module):
    """Patches -> rows for the decoder, and features for its first layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_dim, config.hidden_size)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.merger = _Merger(config, late=False)
        self.merger_list = nn.ModuleList(
            _Merger(config, late=True) for _ in config.deepstack_visual_indexes
        )

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint: the embedding is a convolution there."""
        if name == "patch_embed.weight":
            return (Source(("patch_embed.proj.weight",), lambda found: found[0].flatten(1)),)
        return (Source((name.replace("patch_embed.", "patch_embed.proj."),)),)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Seen:
        """Encode images and videos.

        Args:
            patches: `[patches, patch_dim]`, those of one image after those of the other, in the
                order of `pixels.to_patches`.
            grids: of each image.

        Raises:
            ValueError: the grids are not those of the patches.
        """
        if sum(grid.patches for grid in grids) != len(patches):
            raise ValueError(f"{len(patches)} patches, and the grids {list(grids)} of others")
        weight = self.pos_embed.weight
        x = apply(self.patch_embed, patches.to(weight.dtype))
        x = x + _joined([self._places(grid) for grid in grids])
        angle = _joined([self._angles(grid, x.device) for grid in grids])
        angles = angle.cos(), angle.sin()
        lengths = [grid.height * grid.width for grid in grids for _ in range(grid.times)]
        features, added = [], None
        for index, block in enumerate(self.blocks):
            x, added = block(x, added, angles, lengths)
            if index in self.config.deepstack_visual_indexes:
                x, added = x + added, None
                features.append(self.merger_list[len(features)](x))
        x = x if added is None else x + added
        return Seen(self.merger(x), tuple(features), x)

    def _places(self, grid: Grid) -> Tensor:
        """Learned positions `[patches, hidden]`, between the four that are nearest."""
        weight, side = self.pos_embed.weight, self.config.side
        rows, columns = (
            _neighbours(count, side, weight.device) for count in (grid.height, grid.width)
        )
        found = 0
        for row, share in rows:
            for column, other in columns:
                near = weight[(row[:, None] * side + column).flatten()]
                found = found + near * (share[:, None] * other).flatten()[:, None].to(weight.dtype)
        return self._merge_order(found, grid).repeat(grid.times, 1)

    def _angles(self, grid: Grid, device: torch.device) -> Tensor:
        """Rotary angles float32 `[patches, head_dim / 2]`: those of the row, then of the column."""
        half = self.config.hidden_size // self.config.num_heads // 2
        exponents = torch.arange(0, half, 2, device=device).float() / half
        rates = 1.0 / 10000.0**exponents
        row, column = (
            torch.arange(count, device=device)[:, None] * rates
            for count in (grid.height, grid.width)
        )
        shape = grid.height, grid.width, len(rates)
        angle = torch.cat([row[:, None].expand(shape), column.expand(shape)], -1).flatten(0, 1)
        return self._merge_order(angle, grid).repeat(grid.times, 1)

    def _merge_order(self, x: Tensor, grid: Grid) -> Tensor:
        """Rows `[height * width, ...]`, row by row, to the order of patches."""
        merge = self.config.spatial_merge_size
        blocks = x.view(grid.height // merge, merge, grid.width // merge, merge, -1)
        return blocks.transpose(1, 2).flatten(0, 3)


def _neighbours(count: int, side: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The rows of a table of `side` around `count` places from its first to its last row, and how
    near they are."""
    place = torch.linspace(0, side - 1, count, device=device)
    below = place.long()
    above = (below + 1).clamp_max(side - 1)
    share = place - below
    return [(below, 1 - share), (above, share)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
