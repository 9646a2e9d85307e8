"""The transformer of SigLIP (Zhai et al., arXiv 2303.15343): what BAGEL and pi0.5 see with.

Pre-norm layers, learned positions, no class token, no pooling. Patches of several images are rows
of one batch, as in NaViT (Dehghani et al., arXiv 2307.06304): an image attends to itself only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.layers.linear import apply
from mstar.engine.layers.packed import packed_attention
from mstar.engine.layers.residual import normed
from mstar.engine.weights import Source

__all__ = ["Siglip", "SiglipSizes"]


class SiglipSizes(Protocol):
    """Sizes of the network: values of a patch, layers, rows of the table of positions, ..."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    layer_norm_eps: float

    @property
    def layers(self) -> int: ...
    @property
    def patch_dim(self) -> int: ...
    @property
    def positions(self) -> int: ...


class _Embeddings(nn.Module):
    def __init__(self, sizes: SiglipSizes) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(sizes.patch_dim, sizes.hidden_size)
        self.position_embedding = nn.Embedding(sizes.positions, sizes.hidden_size)


class _Attention(nn.Module):
    def __init__(self, sizes: SiglipSizes) -> None:
        super().__init__()
        size = sizes.hidden_size
        self.heads = sizes.num_attention_heads
        self.qkv_proj = nn.Linear(size, 3 * size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        q, k, v = apply(self.qkv_proj, x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return apply(self.out_proj, packed_attention(q, k, v, lengths).flatten(1))


class _MLP(nn.Module):
    def __init__(self, sizes: SiglipSizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.fc2 = nn.Linear(sizes.intermediate_size, sizes.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.fc2, F.gelu(apply(self.fc1, x), approximate="tanh"))


class _Layer(nn.Module):
    def __init__(self, sizes: SiglipSizes) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)
        self.self_attn = _Attention(sizes)
        self.layer_norm2 = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)
        self.mlp = _MLP(sizes)

    def forward(
        self, x: Tensor, added: Tensor | None, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """What leaves is the residual stream and what is still to be added to it; what comes too,
        so that a norm takes the addition along."""
        h, x = normed(self.layer_norm1, x, added)
        h, x = normed(self.layer_norm2, self.self_attn(h, lengths), x)
        return x, self.mlp(h)


class _Encoder(nn.Module):
    def __init__(self, sizes: SiglipSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(sizes) for _ in range(sizes.layers))


class Siglip(nn.Module):
    """Patches -> features. How images become patches and positions is up to the model."""

    def __init__(self, config: SiglipSizes) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint: projections that we run as one are apart."""
        if "qkv_proj" not in name:
            return (Source((name,)),)
        return (Source(tuple(name.replace("qkv_proj", f"{part}_proj") for part in "qkv")),)

    def encode(self, patches: Tensor, places: Tensor, lengths: Sequence[int]) -> Tensor:
        """Features `[patches, hidden]`.

        Args:
            patches: `[patches, patch_dim]`, those of one image after those of the other.
            places: what is added for where they are, `[patches, hidden]`.
            lengths: patches of each image.
        """
        weight = self.embeddings.patch_embedding.weight
        x = apply(self.embeddings.patch_embedding, patches.to(weight.dtype)) + places
        added = None
        for layer in self.encoder.layers:
            x, added = layer(x, added, lengths)
        return normed(self.post_layernorm, x, added)[0]
