"""Which sequences of a decode step begin with the same pages.

Forks and finds in the prefix cache share pages. The product of decode attention has 16 rows, and
the query heads of a kv head seldom fill them: so the first of `forks_together` neighbours in the
batch attends for all of them to the chunks that they share, and reads these once
(`paged_decode`). That takes no more than this kernel, once per step, and leaves each row's
arithmetic as it is without the others. A batch is ordered by age, so forks are neighbours.

Only whole chunks are shared, so prefixes from 256 tokens on, and only by sequences that are cut
alike: short ones all are (256 tokens a chunk), long ones if their lengths are close. Extension does
without. There a sequence's queries fill blocks of rows by themselves, so those of two forks
together would be as many and read as much; and pages that one fork reads are in the GPU's
second-level cache when the next one does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl
from mstar.engine.kernels.paged_batch import BatchTensors

__all__ = ["ROWS", "forks_together", "shared_keys", "with_shared"]

ROWS = 16  # of the smallest matrix product
_BLOCK = 1024  # pages compared at a time


def forks_together(q: Tensor, k_pages: Tensor) -> int:
    """Sequences whose queries fit into one product, a power of two. A property of the model."""
    group = q.shape[1] // k_pages.shape[2]
    return next_power_of_2(ROWS // group + 1) // 2 or 1


def with_shared(batch: BatchTensors, q: Tensor, k_pages: Tensor) -> BatchTensors:
    """The batch with `shared`, for all layers of a step. Nothing is read on the host, and a step
    that is captured looks again in each replay."""
    if batch.shared is not None or not batch.has_decode:
        return batch
    return batch._replace(shared=shared_keys(batch, forks_together(q, k_pages)))


def shared_keys(batch: BatchTensors, together: int) -> Tensor:
    """int32 `[B]`: how many keys, in whole pages, a sequence has in common with the first one of
    its `together` neighbours; 0 for that one itself and where one of both does not decode."""
    sequences = len(batch.block_table)
    shared = torch.empty(sequences, dtype=torch.int32, device=batch.block_table.device)
    if together == 1 or sequences == 1:
        return shared.zero_()
    _shared_kernel[(sequences,)](
        batch.query_start,
        batch.kv_len,
        batch.block_table,
        shared,
        batch.block_table.stride(0),
        TOGETHER=together,
        PAGE_SIZE=batch.page_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return shared


@jit(varying=("table_stride",))
def _shared_kernel(
    query_start,
    kv_lens,
    block_table,
    shared,
    table_stride,
    TOGETHER: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    first = sequence // TOGETHER * TOGETHER
    length = tl.load(query_start + sequence + 1) - tl.load(query_start + sequence)
    others = tl.load(query_start + first + 1) - tl.load(query_start + first)
    keys = tl.minimum(tl.load(kv_lens + sequence), tl.load(kv_lens + first))
    same = tl.where((length == 1) & (others == 1) & (sequence != first), keys // PAGE_SIZE, 0)
    start = 0
    while start < same:
        index = start + tl.arange(0, BLOCK)
        mine = tl.load(block_table + sequence * table_stride + index, mask=index < same, other=0)
        his = tl.load(block_table + first * table_stride + index, mask=index < same, other=0)
        same = tl.minimum(same, tl.min(tl.where(mine != his, index, same), axis=0))
        start += BLOCK
    tl.store(shared + sequence, same * PAGE_SIZE)
