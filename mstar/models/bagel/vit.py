"""The vision encoder: SigLIP (Zhai et al., arXiv 2303.15343) on images of any size and shape.

As in NaViT (Dehghani et al., arXiv 2307.06304) the patches of several images are rows of one batch;
an image attends to itself only. Pre-norm layers, learned positions, no class token, no pooling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.layers.linear import linear
from mstar.engine.weights import Source
from mstar.models.bagel.config import ViTConfig
from mstar.models.bagel.positions import Grid, grid_rows

__all__ = ["VisionEncoder"]


class _Embeddings(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size)
        self.position_embedding = nn.Embedding(config.positions, config.hidden_size)


class _Attention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv_proj = nn.Linear(size, 3 * size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        q, k, v = _apply(self.qkv_proj, x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return _apply(self.out_proj, _attention(q, k, v, lengths).flatten(1))


class _MLP(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return _apply(self.fc2, F.gelu(_apply(self.fc1, x), approximate="tanh"))


class _Layer(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), lengths)
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))


class VisionEncoder(nn.Module):
    """Patches -> features.

    Args:
        side: patches along the sides of the table of positions.
    """

    def __init__(self, config: ViTConfig, side: int) -> None:
        super().__init__()
        self.config = config
        self.side = side
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint: projections that we run as one are apart."""
        if "qkv_proj" not in name:
            return (Source((name,)),)
        return (Source(tuple(name.replace("qkv_proj", f"{part}_proj") for part in "qkv")),)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Encode images.

        Args:
            patches: `[patches, patch_dim]`, those of one image after those of the other, each
                image row by row (`pixels.patchify`), -1 to 1.
            grids: patches down and across each image.

        Returns:
            Features `[patches, hidden]`.

        Raises:
            ValueError: an image is larger than the table of positions, or the grids are not those
                of the patches.
        """
        lengths = [rows * columns for rows, columns in grids]
        if sum(lengths) != len(patches):
            raise ValueError(f"{len(patches)} patches, and the grids {list(grids)} of others")
        weight = self.embeddings.patch_embedding.weight
        table = self.embeddings.position_embedding.weight[: self.side**2]
        places = [grid_rows(table, grid) for grid in grids]
        x = _apply(self.embeddings.patch_embedding, patches.to(weight.dtype))
        x = x + (places[0] if len(places) == 1 else torch.cat(places))
        for layer in self.encoder.layers:
            x = layer(x, lengths)
        return self.post_layernorm(x)


def _attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Full attention `[patches, heads, head_dim]` within each image."""
    count = len(lengths)
    if len(set(lengths)) == 1:  # images of one size are a batch
        return _attend(*(x.unflatten(0, (count, -1)) for x in (q, k, v))).flatten(0, 1)
    pieces = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([_attend(*(x.unsqueeze(0) for x in piece))[0] for piece in pieces])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention `[images, patches, heads, head_dim]`."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)
