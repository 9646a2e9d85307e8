"""The attentive classifier: a learned query looks at a clip's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mstar.engine.layers.linear import apply
from mstar.engine.weights import Source
from mstar.models.vjepa2.block import MLP, Block, attend
from mstar.models.vjepa2.config import BlockSizes
from mstar.models.vjepa2.layout import POOLER_BLOCK, sources

__all__ = ["Classifier"]


class _CrossProjections(nn.Module):
    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.q = nn.Linear(sizes.width, sizes.width)
        self.kv = nn.Linear(sizes.width, 2 * sizes.width)


class _CrossBlock(nn.Module):
    """The query is not normalised, and what it saw is not projected."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norm1 = nn.LayerNorm(sizes.width, sizes.eps)
        self.xattn = _CrossProjections(sizes)
        self.norm2 = nn.LayerNorm(sizes.width, sizes.eps)
        self.mlp = MLP(sizes)

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        q = apply(self.xattn.q, queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = apply(self.xattn.kv, self.norm1(x)).unflatten(-1, (2, self.heads, -1))
        k, v = kv.transpose(1, 3).unbind(2)
        queries = queries + attend(q, k, v).transpose(1, 2).flatten(2)
        return queries + self.mlp(self.norm2(queries))


class _Pooler(nn.Module):
    def __init__(self, sizes: BlockSizes, layers: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, 1, sizes.width))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(layers))
        self.cross_attention_block = _CrossBlock(sizes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, None)
        return self.cross_attention_block(self.query_tokens.expand(len(x), -1, -1), x)[:, 0]


class Classifier(nn.Module):
    """Tokens of the encoder to scores of classes. There are no positions here."""

    def __init__(self, sizes: BlockSizes, layers: int, labels: int) -> None:
        super().__init__()
        self.pooler = _Pooler(sizes, layers)
        self.linear = nn.Linear(sizes.width, labels)

    def sources(self, name: str) -> Sequence[Source]:
        if name == "pooler.query_tokens":
            return (Source((name,)),)
        path = name.removeprefix("pooler.")
        original = "pooler." if path != name else ""
        layers = "pooler.self_attention_layers"
        return sources(path, original, {"linear": "classifier"}, layers, POOLER_BLOCK)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[batch, labels]` of tokens `[batch, tokens, width]`."""
        return apply(self.linear, self.pooler(tokens))
