"""Attention in both directions, over keys and values that lie in one buffer per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.layers.rotary import rotate

__all__ = ["KeysValues", "attend", "joined", "rotated"]


@dataclass(frozen=True)
class KeysValues:
    """What the prefix leaves to the expert: keys (rotated) and values of every layer.

    Behind them, each buffer has room for those of the expert's own tokens, which every step
    overwrites: nothing is copied or concatenated in the loop.

    Args:
        keys, values: for each layer `[batch, kv_heads, room + horizon, head_dim]`.
        room: rows that the prefix has, of which some may be padding.
        positions: of the expert's tokens, int `[batch, horizon]`.
        seen: which rows are attended to, bool `[batch, 1, 1, room + horizon]`; None for all.
    """

    keys: list[Tensor]
    values: list[Tensor]
    room: int
    positions: Tensor
    seen: Tensor | None = None


def joined(parts: Sequence[KeysValues]) -> KeysValues:
    """Those of several observations with as much room each, as one batch."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return KeysValues(
        [torch.cat(layer) for layer in zip(*(part.keys for part in parts), strict=True)],
        [torch.cat(layer) for layer in zip(*(part.values for part in parts), strict=True)],
        first.room,
        torch.cat([part.positions for part in parts]),
        None if first.seen is None else torch.cat([part.seen for part in parts]),
    )


def rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Heads `[batch, tokens, heads, head_dim]`, rotated by angles `[batch * tokens, ...]`."""
    return rotate(x.flatten(0, 1), *angles).view(x.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Every query attends to every key that is seen; scores are scaled by 1 / sqrt(head_dim).

    Query head h reads key head `h // (heads / kv_heads)`. What a query may see does not depend on
    where it is, so the heads that read the same keys are rows of one product.

    Args:
        q: `[batch, tokens, heads, head_dim]`.
        k, v: `[batch, kv_heads, keys, head_dim]`.
        seen: bool `[batch, 1, 1, keys]`.

    Returns:
        `[batch, tokens, heads * head_dim]`.
    """
    tokens, heads, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    rows = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen)
    out = out.unflatten(2, (heads // kv_heads, tokens)).permute(0, 3, 1, 2, 4)
    return out.flatten(2)
