"""Tiles of the attention kernels.

The choice is one of a model on a GPU, never of a batch, so that a sequence's result does not depend
on what else is in its batch. So it is measured with a batch of its own. The first of each fits
every GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import next_power_of_2
from mstar.engine.kernels.paged_batch import FEW, BatchTensors, Few
from mstar.engine.kernels.tuning import Choice, best

__all__ = [
    "DECODE",
    "DECODE_FEW",
    "EXTEND",
    "block_keys",
    "get_ready",
    "takes_few",
    "tile_for",
    "tiles",
]

DECODE, DECODE_FEW, EXTEND = "paged_decode", "paged_decode_few", "paged_extend"
# Keys are read where the block table says, after it was read: it takes two more stages to have one
# more block of keys under way.
_NARROW = {
    DECODE: (
        Choice(num_warps=4, num_stages=2),
        Choice(num_warps=4, num_stages=5),
        Choice(num_warps=4, num_stages=7),
        Choice(num_warps=2, num_stages=5),
    ),
    DECODE_FEW: (
        Choice(num_warps=4, num_stages=2),
        Choice(num_warps=4, num_stages=5),
        Choice(num_warps=8, num_stages=5),
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
    DECODE_FEW: (
        Choice(num_warps=8, num_stages=1),
        Choice(num_warps=8, num_stages=2),
    ),
    EXTEND: (
        Choice(BLOCK_M=32, num_warps=8, num_stages=1),  # float32 takes registers, not matrix units
        Choice(BLOCK_M=64, num_warps=8, num_stages=2),
        Choice(BLOCK_M=128, num_warps=8, num_stages=2),
    ),
}


# What is measured: sequences, new tokens of each, and keys, as far as the pool has them.
_MEASURED = {DECODE: (16, 1, 2048), DECODE_FEW: (4, FEW, 2048), EXTEND: (1, 1024, 1024)}

_ready: set[tuple[str, str, torch.device]] = set()


def tile_for(
    kernel: str, q: Tensor, k_pages: Tensor, v_pages: Tensor, launch: Callable[..., Tensor]
) -> Choice:
    """The fastest tile, as measured; the pool is only read."""
    sample = cache(lambda: _sample(kernel, q, k_pages))  # made when it is needed, and once

    def run(choice: Choice) -> Tensor:
        rows, batch = sample()
        return launch(rows, k_pages, v_pages, batch, 1.0, tile=choice)

    return best(kernel, *tiles(kernel, q, k_pages), run, q.device)


def get_ready(
    kernel: str, q: Tensor, k_pages: Tensor, v_pages: Tensor, launch: Callable[..., Tensor]
) -> None:
    """Launch a kernel once for a model: so it is compiled before it is needed."""
    key = kernel, tiles(kernel, q, k_pages)[0], q.device
    if key not in _ready and not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        _ready.add(key)
        rows, batch = _sample(kernel, q, k_pages)
        launch(rows, k_pages, v_pages, batch, 1.0)


def _sample(kernel: str, q: Tensor, k_pages: Tensor) -> tuple[Tensor, BatchTensors]:
    """Queries and a batch whose pages are scattered over a pool."""
    count, new, keys = _MEASURED[kernel]
    pages, size = k_pages.shape[:2]
    width = max(1, min(keys // size, pages))
    new = min(new, width * size)
    ints = {"dtype": torch.int32, "device": q.device}
    numbers = torch.arange(count, **ints)
    table = torch.arange(count * width, **ints) * 97 % pages
    batch = BatchTensors(
        query_start=torch.arange(count + 1, **ints) * new,
        kv_len=torch.full((count,), width * size, **ints),
        block_table=table.view(count, width),
        causal=torch.ones(count, **ints),
        max_query_len=new,
        page_size=size,
        few=Few(torch.stack([numbers, numbers * new], 1), count * new),
        shared=torch.zeros(count, **ints),
    )
    return q.new_zeros(count * new, *q.shape[1:]), batch


def block_keys(q: Tensor) -> int:
    """Keys of a block: 64 of up to 256 bytes, fewer of wider ones; 32 in float32, whose products
    take registers."""
    size = q.element_size()
    return max(16, min(128 // size, (1 << 14) // (next_power_of_2(q.shape[2]) * size)))


def takes_few(q: Tensor, k_pages: Tensor) -> bool:
    """Whether the query heads of `FEW` tokens fit into the rows of one product."""
    rows = FEW * (q.shape[1] // k_pages.shape[2])
    return rows <= (64 if block_keys(q) == 64 else 32)


def tiles(kernel: str, q: Tensor, k_pages: Tensor) -> tuple[str, tuple[Choice, ...]]:
    """What a choice is measured for, and the choices.

    Args:
        kernel: `DECODE`, `DECODE_FEW` or `EXTEND`.
        q: `[tokens, heads, dim]`.
        k_pages: `[pages, page_size, kv_heads, dim]`.
    """
    _, heads, dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    shape = f"{q.dtype} {heads // kv_heads} heads of {dim}, pages of {page_size}"
    return shape, (_NARROW if block_keys(q) == 64 else _WIDE)[kernel]
