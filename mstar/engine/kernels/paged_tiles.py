"""Tiles of the attention kernels.

The choice is one of a model on a GPU, never of a batch, so that a sequence's result does not depend
on what else is in its batch. The first of each is what runs where nothing was measured.
"""

from __future__ import annotations

from torch import Tensor

from mstar.engine.kernels.dispatch import next_power_of_2
from mstar.engine.kernels.tuning import Choice

__all__ = ["DECODE", "EXTEND", "is_wide", "tiles"]

DECODE, EXTEND = "paged_decode", "paged_extend"
# Keys are read where the block table says, after it was read: it takes two more stages to have one
# more block of keys under way.
_NARROW = {
    DECODE: (
        Choice(num_warps=4, num_stages=2),
        Choice(num_warps=4, num_stages=5),
        Choice(num_warps=4, num_stages=7),
        Choice(num_warps=2, num_stages=5),
    ),
    EXTEND: (
        Choice(BLOCK_M=64, num_warps=4, num_stages=2),
        Choice(BLOCK_M=64, num_warps=4, num_stages=5),
        Choice(BLOCK_M=128, num_warps=8, num_stages=2),
        Choice(BLOCK_M=128, num_warps=8, num_stages=5),
    ),
}
_WIDE = {
    DECODE: (
        Choice(num_warps=8, num_stages=2),
        Choice(num_warps=4, num_stages=2),
        Choice(num_warps=4, num_stages=5),
    ),
    EXTEND: (
        Choice(BLOCK_M=64, num_warps=8, num_stages=2),
        Choice(BLOCK_M=64, num_warps=4, num_stages=2),
        Choice(BLOCK_M=128, num_warps=8, num_stages=2),
    ),
}


def is_wide(q: Tensor) -> bool:
    """Whether rows have more than 256 bytes: smaller tiles, more registers."""
    return max(16, next_power_of_2(q.shape[2])) * q.element_size() > 256


def tiles(kernel: str, q: Tensor, k_pages: Tensor) -> tuple[str, tuple[Choice, ...]]:
    """What a choice is measured for, and the choices.

    Args:
        kernel: `DECODE` or `EXTEND`.
        q: `[tokens, heads, dim]`.
        k_pages: `[pages, page_size, kv_heads, dim]`.
    """
    _, heads, dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    shape = f"{q.dtype} {heads // kv_heads} heads of {dim}, pages of {page_size}"
    return shape, (_WIDE if is_wide(q) else _NARROW)[kernel]
