"""Full attention within pieces of one long row of tokens (NaViT, arXiv 2307.06304, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["packed_attention"]


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attention of tokens to those of their own piece; neighbours of one length are a batch.

    Args:
        q, k, v: `[tokens, heads, head_dim]`, one piece after the other.
        lengths: tokens of each piece.

    Returns:
        `[tokens, heads, head_dim]`. Scores are scaled by 1 / sqrt(head_dim).
    """
    done, start = [], 0
    for length, pieces in groupby(lengths):
        end = start + length * len(list(pieces))
        batch = (x[start:end].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        done.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
        start = end
    return done[0] if len(done) == 1 else torch.cat(done)
