"""How a network's layers reach the keys and values of earlier tokens.

A network calls `context.attend(...)` in every layer and does not know where the cache lies. The
engine passes a `PagedContext` (`mstar/engine/paged_context.py`); without the engine a
`CausalContext` runs one plain sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.rms_norm import rms_norm
from mstar.engine.kernels.rotary_store import HeadNorms
from mstar.engine.layers.rotary import rotate

__all__ = ["AttentionContext", "CausalContext", "GrowingContext", "HeadNorms", "Projected"]


class Projected(NamedTuple):
    """Queries, keys and values of some of the tokens at hand: those of one expert, say.

    Args:
        qkv: `[tokens, (heads + 2 * kv_heads) * head_dim]`, queries, keys, values.
        norms: of the query and key heads, where the network has such.
    """

    qkv: Tensor
    norms: HeadNorms | None = None


class AttentionContext(Protocol):
    """Attention of the tokens at hand over themselves and whatever came before them."""

    def attend(
        self,
        layer: int,
        parts: Sequence[Projected],
        angles: tuple[Tensor, Tensor],
        heads: int,
        kv_heads: int,
    ) -> Tensor:
        """Norm and rotate queries and keys, keep keys and values, attend.

        Args:
            parts: the tokens, in their order.
            angles: cos and sin, float32 `[tokens, head_dim / 2]`.

        Returns:
            `[tokens, heads * head_dim]`. Scores are scaled by 1 / sqrt(head_dim).
        """


class CausalContext:
    """One sequence from its beginning, with nothing cached: the plain path."""

    def attend(
        self,
        layer: int,
        parts: Sequence[Projected],
        angles: tuple[Tensor, Tensor],
        heads: int,
        kv_heads: int,
    ) -> Tensor:
        """See `AttentionContext.attend`."""
        q, k, v = _split(parts, angles, heads, kv_heads)
        return _attention(q, k, v, causal=True)


class GrowingContext:
    """One sequence, span by span, with its keys and values in plain tensors: the plain path.

    Args:
        causal: whether tokens of the next span see only those before them.
        keep: whether the next span's keys and values stay.
    """

    def __init__(self) -> None:
        self.causal = True
        self.keep = True
        self._cached: dict[int, tuple[Tensor, Tensor]] = {}

    def fork(self) -> GrowingContext:
        """A second sequence with the same beginning."""
        other = GrowingContext()
        other._cached = dict(self._cached)
        return other

    def cached(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each `[tokens, kv_heads, head_dim]`."""
        return self._cached[layer]

    def attend(
        self,
        layer: int,
        parts: Sequence[Projected],
        angles: tuple[Tensor, Tensor],
        heads: int,
        kv_heads: int,
    ) -> Tensor:
        """See `AttentionContext.attend`."""
        q, k, v = _split(parts, angles, heads, kv_heads)
        if layer in self._cached:
            before = self._cached[layer]
            k, v = torch.cat([before[0], k]), torch.cat([before[1], v])
        if self.keep:
            self._cached[layer] = k, v
        return _attention(q, k, v, causal=self.causal)


def _split(
    parts: Sequence[Projected], angles: tuple[Tensor, Tensor], heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[tokens, heads, head_dim]`, normed and rotated."""
    split = []
    for qkv, norms in parts:
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split(
            [heads, kv_heads, kv_heads], dim=1
        )
        if norms is not None:
            q = rms_norm(q.contiguous(), norms.query, norms.eps)
            k = rms_norm(k.contiguous(), norms.key, norms.eps)
        split.append((q, k, v))
    q, k, v = (torch.cat(rows) for rows in zip(*split, strict=True))
    return rotate(q, *angles), rotate(k, *angles), v


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    mask = None
    if causal and len(q) < len(k):
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
        mask = mask.tril_(len(k) - len(q))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=True
    )
    return out[0].transpose(0, 1).flatten(1)
