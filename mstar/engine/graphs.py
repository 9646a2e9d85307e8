"""CUDA graphs of decode steps: one per batch bucket, replayed with no Python in between.

A captured step reads its inputs from fixed tensors. A batch is padded to the next bucket with rows
that store nothing (slot -1) and look at one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mstar.engine.captured import Captured, Outputs, Record, Step
from mstar.engine.kernels.paged_batch import BatchTensors
from mstar.engine.kernels.staging import block_table, pack
from mstar.engine.kvcache import KVPool
from mstar.engine.paged_context import PagedContext

__all__ = ["DecodeGraphs"]


class DecodeGraphs:
    """Captured single-token steps of one network over one pool.

    Args:
        forward: `(ids, positions, context, *more) -> (hidden, logits)`, or what else has a row for
            each sequence; all on the device.
        buckets: batch sizes to capture, ascending.
        max_tokens: longest sequence; sets the width of the block tables.
        record: how to capture (see `record`).
        width: of the embeddings that are the inputs, in the pool's dtype; 0 for ids.
        fractions: whether positions are float32 (what is written to the device are their bits).
        more: further inputs of a bucket, by its size, as it is captured with: each `[..., batch]`.
    """

    def __init__(
        self,
        forward: Step,
        pool: KVPool,
        buckets: Sequence[int],
        max_tokens: int,
        record: Record,
        width: int = 0,
        fractions: bool = False,
        more: Callable[[int], Sequence[Tensor]] = lambda size: (),
    ) -> None:
        self.forward = forward
        self.pool = pool
        self.buckets = sorted(buckets)
        self.max_pages = min(pool.pages_for(max_tokens), pool.table.count)
        self.width = width
        self.fractions = fractions
        self.more = more
        self._captured: dict[int, Captured] = {}
        self._record = record

    def capture(self) -> None:
        """Capture every bucket, the largest first so that the others reuse its memory."""
        for size in reversed(self.buckets):
            self._at(size)

    def fits(self, count: int, tables: Sequence[Sequence[int]]) -> bool:
        """Whether a decode batch can be replayed."""
        return count <= self.buckets[-1] and max(map(len, tables)) <= self.max_pages

    def bucket(self, count: int) -> int:
        """The size of the bucket of a batch; it is captured now, if it was not yet."""
        size = next(b for b in self.buckets if b >= count)
        self._at(size)
        return size

    def run(
        self,
        ids: Tensor,
        positions: Sequence[float],
        kv_lens: Sequence[int],
        tables: Sequence[Sequence[int]],
        *more: Tensor,
    ) -> Outputs:
        """Replay one step; hidden states and logits of the rows, valid until the next step.

        Args:
            ids: int64 `[batch]`, or embeddings `[batch, width]`, on the device.
            kv_lens: keys per sequence, those of the new token included.
            tables: page numbers per sequence.
            more: of the rows; padded rows that are not given keep what they had.
        """
        count = len(kv_lens)
        size = self.bucket(count)
        step = self._at(size)
        own_ids, own_numbers, own_pages, *own_more = step.inputs
        page, pad = self.pool.page_size, [0] * (size - count)
        slots = [
            table[(length - 1) // page] * page + (length - 1) % page
            for table, length in zip(tables, kv_lens, strict=True)
        ]
        if self.fractions:
            positions = np.asarray(positions, dtype=np.float32).view(np.int32)
        numbers = [*positions, *pad, *slots, *(-1 for _ in pad), *kv_lens, *(1 for _ in pad)]
        table = block_table(tables)
        numbers, pages = pack((numbers, table.ravel()), torch.int32, own_ids.device)
        own_ids[:count].copy_(ids)
        own_numbers.copy_(numbers.view(3, size))
        own_pages[:count, : table.shape[1]].copy_(pages.view(table.shape))
        for own, given in zip(own_more, more, strict=True):
            own[..., : given.shape[-1]].copy_(given)
        step.replay()
        return tuple(output[:count] for output in step.outputs)

    def _at(self, size: int) -> Captured:
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        return self._captured[size]

    def _capture(self, size: int) -> Captured:
        device = self.pool.tensor.device
        ids = torch.zeros(size, dtype=torch.int64, device=device)
        if self.width:
            ids = self.pool.tensor.new_zeros(size, self.width)
        # An even width: every row begins at a multiple of 16 bytes, as tensors of their own do.
        numbers = torch.zeros(3, size + size % 2, dtype=torch.int64, device=device)[:, :size]
        numbers[1] = -1
        numbers[2] = 1
        pages = torch.zeros(size, self.max_pages, dtype=torch.int32, device=device)
        query_start = torch.arange(size + 1, dtype=torch.int32, device=device)
        causal = torch.ones(size, dtype=torch.int32, device=device)

        def step(ids: Tensor, numbers: Tensor, pages: Tensor, *more: Tensor) -> Outputs:
            positions, slots, lengths = numbers
            if self.fractions:
                positions = positions.to(torch.int32).view(torch.float32)
            batch = BatchTensors(
                query_start=query_start,
                kv_len=lengths.to(torch.int32),
                block_table=pages,
                causal=causal,
                max_query_len=1,
                page_size=self.pool.page_size,
            )
            return self.forward(ids, positions, PagedContext(self.pool, batch, slots), *more)

        return Captured(self._record, step, (ids, numbers, pages, *self.more(size)))
