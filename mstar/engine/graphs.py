"""CUDA graphs of decode steps: one per batch bucket, replayed with no Python in between.

A captured step reads its inputs from fixed tensors. A batch is padded to the next bucket with rows
that store nothing (slot -1) and look at one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.engine.kernels.paged_batch import BatchTensors
from mstar.engine.kvcache import KVPool
from mstar.engine.paged_context import PagedContext

__all__ = ["DecodeGraphs"]

Forward = Callable[[Tensor, Tensor, PagedContext], tuple[Tensor, Tensor]]


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    ids: Tensor
    positions: Tensor
    slots: Tensor
    batch: BatchTensors
    outputs: tuple[Tensor, Tensor]


class DecodeGraphs:
    """Captured single-token steps of one network over one pool.

    Args:
        forward: `(ids, positions, context) -> (hidden, logits)`, all on the device.
        buckets: batch sizes to capture, ascending.
        max_tokens: longest sequence; sets the width of the block tables.
    """

    def __init__(
        self, forward: Forward, pool: KVPool, buckets: Sequence[int], max_tokens: int
    ) -> None:
        self.forward = forward
        self.pool = pool
        self.buckets = sorted(buckets)
        self.max_pages = min(pool.pages_for(max_tokens), pool.table.count)
        self._captured: dict[int, _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self) -> None:
        """Capture every bucket, the largest first so that the others reuse its memory."""
        for size in reversed(self.buckets):
            if size not in self._captured:
                self._captured[size] = self._capture(size)

    def fits(self, count: int, tables: Sequence[Sequence[int]]) -> bool:
        """Whether a decode batch can be replayed."""
        return count <= self.buckets[-1] and max(map(len, tables)) <= self.max_pages

    def run(
        self,
        ids: Tensor,
        positions: Sequence[int],
        slots: Sequence[int],
        kv_lens: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        """Replay one step; hidden states and logits of the rows, valid until the next step."""
        count = len(kv_lens)
        size = next(b for b in self.buckets if b >= count)
        step = self._captured.get(size)
        if step is None:
            step = self._captured[size] = self._capture(size)
        pad = size - count
        width = max(map(len, tables))
        rows = [[*table, *[0] * (width - len(table))] for table in tables]
        step.ids[:count].copy_(ids, non_blocking=True)
        for target, values in (
            (step.positions, [*positions, *[0] * pad]),
            (step.slots, [*slots, *[-1] * pad]),
            (step.batch.kv_len, [*kv_lens, *[1] * pad]),
            (step.batch.block_table[:count, :width], rows),
        ):
            host = torch.tensor(values, dtype=target.dtype).pin_memory()
            target.copy_(host, non_blocking=True)
        step.graph.replay()
        hidden, logits = step.outputs
        return hidden[:count], logits[:count]

    def _capture(self, size: int) -> _Captured:
        device = self.pool.tensor.device

        def full(shape: tuple[int, ...], value: int, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        batch = BatchTensors(
            query_start=torch.arange(size + 1, dtype=torch.int32, device=device),
            kv_len=full((size,), 1, torch.int32),
            block_table=full((size, self.max_pages), 0, torch.int32),
            causal=full((size,), 1, torch.int32),
            max_query_len=1,
            page_size=self.pool.page_size,
        )
        ids, positions = full((size,), 0, torch.int64), full((size,), 0, torch.int64)
        slots = full((size,), -1, torch.int64)
        context = PagedContext(self.pool, batch, slots)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.forward(ids, positions, context)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread is bound by what may happen during a capture: others go on working.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            outputs = self.forward(ids, positions, context)
        return _Captured(graph, ids, positions, slots, batch, outputs)
