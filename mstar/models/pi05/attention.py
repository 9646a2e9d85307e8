"""Attention in both directions, over keys and values that lie in one buffer per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KeysValues", "attend", "joined"]


@dataclass(frozen=True)
class KeysValues:
    """What the prefix leaves to the expert: keys (rotated) and values of every layer.

    Behind the valid ones, each buffer has room for those of the expert's own tokens, which every
    step overwrites: nothing is copied or concatenated in the loop.

    Args:
        layers: keys and values, `[layers, 2, batch, rows, kv_heads, head_dim]`.
        positions: of the expert's tokens, int `[batch, horizon]`; their rows are the same.
        seen: what is added to scores, `[batch, 1, 1, rows]`: 0 for rows that are attended to, -inf
            for others; None where all are.
    """

    layers: Tensor
    positions: Tensor
    seen: Tensor | None = None

    def slots(self, rows: Tensor) -> Tensor:
        """Of rows int `[batch, tokens]`, counted through the batch: int64 `[batch * tokens]`."""
        batch, size = self.layers.shape[2:4]
        first = torch.arange(batch, device=rows.device).unsqueeze(1) * size
        return (first + rows).flatten()


def joined(parts: Sequence[KeysValues]) -> KeysValues:
    """Those of several observations with as much room each, as one batch."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return KeysValues(
        torch.cat([part.layers for part in parts], 2),
        torch.cat([part.positions for part in parts]),
        None if first.seen is None else torch.cat([part.seen for part in parts]),
    )


def attend(q: Tensor, kv: Tensor, seen: Tensor | None = None) -> Tensor:
    """Every query attends to every key that is seen; scores are scaled by 1 / sqrt(head_dim).

    Query head h reads key head `h // (heads / kv_heads)`. What a query may see does not depend on
    where it is, so the heads that read the same keys are rows of one product.

    Args:
        q: `[batch, tokens, heads, head_dim]`.
        kv: keys and values, `[2, batch, keys, kv_heads, head_dim]`.
        seen: what is added to scores, `[batch, 1, 1, keys]`.

    Returns:
        `[batch, tokens, heads * head_dim]`.
    """
    tokens, heads, kv_heads = q.shape[1], q.shape[2], kv.shape[3]
    rows = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    k, v = kv.transpose(2, 3)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen)
    out = out.unflatten(2, (tokens, heads // kv_heads)).permute(0, 2, 1, 3, 4)
    return out.flatten(2)
