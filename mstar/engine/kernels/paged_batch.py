"""What the paged kernels are told about a batch: which tokens belong to which sequence, and where
their keys and values lie. Built once per step on the host, shared by all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mstar.engine.kernels.staging import block_table, pack, to_device

__all__ = ["FEW", "FEW_KEYS", "BatchTensors", "Few", "PagedBatch", "PagedSpan", "tensors_of"]

FEW = 8  # new tokens up to which a sequence is decoded,
FEW_KEYS = 512  # if it has so many keys: reading fewer in parts does not pay


class Few(NamedTuple):
    """Sequences of a batch that have 2 to `FEW` new tokens and, as a rule, `FEW_KEYS` keys."""

    rows: Tensor  # [count, 2] int32: which sequence, and how many tokens those before it have
    tokens: int  # of all of them


class BatchTensors(NamedTuple):
    """A batch as the Triton kernels read it, all on one device."""

    query_start: Tensor  # [B + 1] int32: sequence b's new tokens are rows start[b] .. start[b + 1]
    kv_len: Tensor  # [B] int32, new tokens included
    block_table: Tensor  # [B, max_pages] int32, rows padded with page 0
    causal: Tensor  # [B] int32, 0 or 1
    max_query_len: int
    page_size: int
    has_decode: bool = True  # some sequence may have exactly one new token
    few: Few | None = None  # None: sequences with more than one new token are all extended
    shared: Tensor | None = None  # see `paged_shared`; made where it is needed, if left out


class PagedSpan(NamedTuple):
    """Where one sequence's keys lie, for the torch path."""

    query_len: int
    kv_len: int
    start: int  # first slot, in the pool or (gathered) in the step's gathered pages
    gathered: bool
    masked: bool  # needs an explicit mask; otherwise `is_causal` says it all
    is_causal: bool


class PagedBatch:
    """Host-side description of one mixed batch over one page pool, shared by all layers of a step.

    Args:
        query_lens: new tokens per sequence; 0 skips the sequence.
        kv_lens: keys per sequence, *including* the new tokens, which are in their pages already
            when attention runs.
        tables: page numbers per sequence, at least enough for ``kv_len`` keys.
        causal: per sequence. True: query i of n sees keys ``0 .. kv_len - n + i``; False: it sees
            all ``kv_len`` keys (full attention inside the new span).
        page_size: slots per page.
        ends: per sequence, where in its keys the new tokens end; at ``kv_len`` if left out. A span
            that is given in several pieces names the same table and ``kv_len`` for each.

    Raises:
        ValueError: the lists disagree, or a table or ``kv_len`` is too short.
    """

    def __init__(
        self,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        tables: Sequence[Sequence[int]],
        causal: Sequence[bool],
        page_size: int,
        ends: Sequence[int] | None = None,
    ) -> None:
        if not len(query_lens) == len(kv_lens) == len(tables) == len(causal):
            raise ValueError(
                "query_lens, kv_lens, tables and causal need one entry per sequence, got "
                f"{len(query_lens)}, {len(kv_lens)}, {len(tables)} and {len(causal)}"
            )
        self.query_lens = list(query_lens)
        self.kv_lens = list(kv_lens)
        self.ends = self.kv_lens if ends is None else list(ends)
        self.tables = tables
        self.causal = list(causal)
        self.page_size = page_size
        self.num_tokens = sum(self.query_lens)
        self._gathered_pages: list[int] = []
        self.spans: list[PagedSpan] = []
        self._slots: list[int] = []
        for index in range(len(self.query_lens)):
            self._add(index)
        self.all_decode = all(span.query_len == 1 for span in self.spans)
        self._slot_tensors: dict[torch.device, Tensor] = {}
        self._index: dict[torch.device, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._masks: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}
        self._tensors: dict[torch.device, BatchTensors] = {}
        self._padded: tuple[Tensor, Tensor] | None = None

    def _add(self, index: int) -> None:
        """Plan sequence ``index``: where its keys are and which slots its new tokens take."""
        n, kv_len, end, table, size = (
            self.query_lens[index],
            self.kv_lens[index],
            self.ends[index],
            self.tables[index],
            self.page_size,
        )
        pages = -(-kv_len // size)
        if not 0 <= n <= end <= kv_len:
            raise ValueError(f"sequence {index}: query_len {n} is not in 0 .. kv_len {kv_len}")
        if end < kv_len and self.causal[index]:
            raise ValueError(f"sequence {index}: causal, but its new tokens are not the last")
        if len(table) < pages:
            raise ValueError(
                f"sequence {index}: kv_len {kv_len} needs {pages} pages of {size}, "
                f"its table has {len(table)}"
            )
        if n == 0:
            return
        first = table[0]
        consecutive = pages == 1 or list(table[:pages]) == list(range(first, first + pages))
        if consecutive:
            start = first * size
            self._slots.extend(range(start + end - n, start + end))
        else:
            start = len(self._gathered_pages) * size
            self._gathered_pages.extend(table[:pages])
            self._slots.extend(
                table[position // size] * size + position % size for position in range(end - n, end)
            )
        causal = bool(self.causal[index]) and n > 1
        self.spans.append(
            PagedSpan(
                query_len=n,
                kv_len=kv_len,
                start=start,
                gathered=not consecutive,
                masked=causal and n < kv_len,
                is_causal=causal and n == kv_len,
            )
        )

    @property
    def slot_list(self) -> list[int]:
        """Flat slot ``page * page_size + offset`` of every new token."""
        return self._slots

    @property
    def slots(self) -> Tensor:
        """`slot_list` as a tensor, ``[T]`` int64 on CPU."""
        return self.slots_on(torch.device("cpu"))

    def slots_on(self, device: torch.device) -> Tensor:
        """`slots` on ``device``, copied there once."""
        found = self._slot_tensors.get(device)
        if found is None:
            found = self._slot_tensors[device] = to_device(self._slots, torch.int64, device)
        return found

    def tensors_on(self, device: torch.device) -> BatchTensors:
        """The batch as the Triton kernels read it, built once per device."""
        found = self._tensors.get(device)
        if found is None:
            starts = [0]
            for n in self.query_lens:
                starts.append(starts[-1] + n)
            few, tokens = self._few()
            table = block_table(self.tables)
            parts = starts, self.kv_lens, self.causal, few, table.ravel()
            query_start, kv_len, causal, rows, pages = pack(parts, torch.int32, device)
            found = BatchTensors(
                query_start=query_start,
                kv_len=kv_len,
                block_table=pages.view(table.shape),
                causal=causal,
                max_query_len=max(self.query_lens, default=0),
                page_size=self.page_size,
                has_decode=1 in self.query_lens,
                few=Few(rows.view(-1, 2), tokens) if few else None,
            )
            self._tensors[device] = found
        return found

    def _few(self) -> tuple[list[int], int]:
        """See `Few`."""
        rows, tokens = [], 0
        for index, (n, kv_len) in enumerate(zip(self.query_lens, self.kv_lens, strict=True)):
            if 1 < n <= FEW and kv_len >= FEW_KEYS:
                rows += index, tokens
                tokens += n
        return rows, tokens

    def mask(self, span: PagedSpan, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive causal mask ``[query_len, kv_len]`` of a span, built once per batch."""
        key = (span.query_len, span.kv_len, dtype, device)
        found = self._masks.get(key)
        if found is None:
            found = torch.full((span.query_len, span.kv_len), -math.inf, dtype=dtype, device=device)
            found.triu_(span.kv_len - span.query_len + 1)
            self._masks[key] = found
        return found

    def padded(self, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Where the keys of all sequences are, each head's as many as the longest has, on a CPU.

        Returns:
            Rows int64 ``[sequences * kv_heads * longest]`` in a pool that is ``[slots * kv_heads,
            head_dim]``, and what is added to the scores, ``[sequences * kv_heads, 1, longest]``:
            0, or -inf for what makes up the length (the sequence's first key).
        """
        if self._padded is None:
            live = [index for index, n in enumerate(self.query_lens) if n]
            lens = np.array([self.kv_lens[index] for index in live])
            place, size = np.arange(lens.max()), self.page_size
            pages = block_table([self.tables[index] for index in live])[:, place // size]
            slots = pages.astype(np.int64) * size + place % size
            beyond = place >= lens[:, None]
            slots = np.where(beyond, slots[:, :1], slots)
            rows = slots[:, None] * kv_heads + np.arange(kv_heads)[:, None]
            mask = np.where(beyond, np.float32(-np.inf), np.float32(0)).repeat(kv_heads, 0)
            self._padded = torch.from_numpy(rows.ravel()), torch.from_numpy(mask).unsqueeze(1)
        return self._padded

    def gather(self, pages: Tensor, name: str) -> Tensor | None:
        """Pages of all scattered sequences in table order, or None where there are none.

        The buffer is one per ``name`` ("k" or "v") and reused by the next layer: fresh memory of
        that size costs several times the copy itself.
        """
        if not self._gathered_pages:
            return None
        index = self._index.get(pages.device)
        if index is None:
            index = to_device(self._gathered_pages, torch.int64, pages.device)
            self._index[pages.device] = index
        shape = (len(self._gathered_pages), *pages.shape[1:])
        buffer = self._buffers.get(name)
        if buffer is None or (*buffer.shape, buffer.dtype) != (*shape, pages.dtype):
            buffer = self._buffers[name] = pages.new_empty(shape)
        return torch.index_select(pages, 0, index, out=buffer)


def tensors_of(batch: PagedBatch | BatchTensors, device: torch.device) -> BatchTensors:
    """A batch as the Triton kernels read it."""
    return batch.tensors_on(device) if isinstance(batch, PagedBatch) else batch
