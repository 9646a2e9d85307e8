"""How a network's layers reach the keys and values of earlier tokens.

A network calls `context.attend(...)` in every layer and does not know where the cache lies. The
engine passes a `PagedContext` (`mstar/engine/paged_context.py`); without the engine a
`CausalContext` runs one plain sequence.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from mstar.engine.layers.rotary import rotate

__all__ = ["AttentionContext", "CausalContext"]


class AttentionContext(Protocol):
    """Attention of the tokens at hand over themselves and whatever came before them."""

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        angles: tuple[Tensor, Tensor],
        heads: int,
        kv_heads: int,
    ) -> Tensor:
        """Rotate queries and keys, keep keys and values, attend.

        Args:
            qkv: `[tokens, (heads + 2 * kv_heads) * head_dim]`, queries, keys, values.
            angles: cos and sin, float32 `[tokens, head_dim / 2]`.

        Returns:
            `[tokens, heads * head_dim]`. Scores are scaled by 1 / sqrt(head_dim).
        """


class CausalContext:
    """One sequence from its beginning, with nothing cached: the plain path."""

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        angles: tuple[Tensor, Tensor],
        heads: int,
        kv_heads: int,
    ) -> Tensor:
        """See `AttentionContext.attend`."""
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split(
            [heads, kv_heads, kv_heads], dim=1
        )
        q, k = rotate(q, *angles), rotate(k, *angles)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)
