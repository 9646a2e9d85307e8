"""Attention over a paged KV cache: one mixed batch of prefills, extensions and decode steps.

A page pool holds keys and values as ``[pages, page_size, kv_heads, head_dim]``; a sequence owns a
list of page numbers, its block table (vLLM, Kwon et al. 2023, section 4.1). `PagedBatch` describes
one step's batch once, on the host, and every layer reuses it.

On CPU each sequence is computed by itself over a *view* of the pool (a gathered copy where its
pages are not consecutive), so its result does not depend on what else is in the batch. On CUDA the
two Triton kernels in `paged_decode` and `paged_extend` run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.dispatch import use_triton
from mstar.engine.kernels.paged_decode import paged_decode_triton
from mstar.engine.kernels.paged_extend import paged_extend_triton

__all__ = [
    "BatchTensors",
    "PagedBatch",
    "paged_attention",
    "paged_attention_torch",
    "paged_attention_triton",
]


class BatchTensors(NamedTuple):
    """A batch as the Triton kernels read it, all on one device."""

    query_start: Tensor  # [B + 1] int32: sequence b's new tokens are rows start[b] .. start[b + 1]
    kv_len: Tensor  # [B] int32, new tokens included
    block_table: Tensor  # [B, max_pages] int32, rows padded with page 0
    causal: Tensor  # [B] int32, 0 or 1
    max_query_len: int
    page_size: int
    has_decode: bool = True  # some sequence may have exactly one new token


class _Span(NamedTuple):
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
    ) -> None:
        if not len(query_lens) == len(kv_lens) == len(tables) == len(causal):
            raise ValueError(
                "query_lens, kv_lens, tables and causal need one entry per sequence, got "
                f"{len(query_lens)}, {len(kv_lens)}, {len(tables)} and {len(causal)}"
            )
        self.query_lens = list(query_lens)
        self.kv_lens = list(kv_lens)
        self.tables = tables
        self.causal = list(causal)
        self.page_size = page_size
        self.num_tokens = sum(self.query_lens)
        self._gathered_pages: list[int] = []
        self._spans: list[_Span] = []
        self._slots: list[int] = []
        for index in range(len(self.query_lens)):
            self._add(index)
        self.all_decode = all(span.query_len == 1 for span in self._spans)
        self._slot_tensors: dict[torch.device, Tensor] = {}
        self._index: dict[torch.device, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._masks: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}
        self._tensors: dict[torch.device, BatchTensors] = {}

    def _add(self, index: int) -> None:
        """Plan sequence ``index``: where its keys are and which slots its new tokens take."""
        n, kv_len, table, size = (
            self.query_lens[index],
            self.kv_lens[index],
            self.tables[index],
            self.page_size,
        )
        pages = -(-kv_len // size)
        if not 0 <= n <= kv_len:
            raise ValueError(f"sequence {index}: query_len {n} is not in 0 .. kv_len {kv_len}")
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
            self._slots.extend(range(start + kv_len - n, start + kv_len))
        else:
            start = len(self._gathered_pages) * size
            self._gathered_pages.extend(table[:pages])
            self._slots.extend(
                table[position // size] * size + position % size
                for position in range(kv_len - n, kv_len)
            )
        causal = bool(self.causal[index]) and n > 1
        self._spans.append(
            _Span(
                query_len=n,
                kv_len=kv_len,
                start=start,
                gathered=not consecutive,
                masked=causal and n < kv_len,
                is_causal=causal and n == kv_len,
            )
        )

    @property
    def slots(self) -> Tensor:
        """Flat slot ``page * page_size + offset`` of every new token, ``[T]`` int64 on CPU."""
        return self.slots_on(torch.device("cpu"))

    def slots_on(self, device: torch.device) -> Tensor:
        """`slots` on ``device``, copied there once."""
        found = self._slot_tensors.get(device)
        if found is None:
            found = torch.tensor(self._slots, dtype=torch.int64).to(device)
            self._slot_tensors[device] = found
        return found

    def tensors_on(self, device: torch.device) -> BatchTensors:
        """The batch as the Triton kernels read it, built once per device."""
        found = self._tensors.get(device)
        if found is None:
            starts = [0]
            for n in self.query_lens:
                starts.append(starts[-1] + n)
            width = max((len(table) for table in self.tables), default=0) or 1
            rows = [list(table) + [0] * (width - len(table)) for table in self.tables]

            def to_device(values: list) -> Tensor:
                return torch.tensor(values, dtype=torch.int32).to(device)

            found = BatchTensors(
                query_start=to_device(starts),
                kv_len=to_device(self.kv_lens),
                block_table=to_device(rows),
                causal=to_device([int(c) for c in self.causal]),
                max_query_len=max(self.query_lens, default=0),
                page_size=self.page_size,
                has_decode=1 in self.query_lens,
            )
            self._tensors[device] = found
        return found

    def mask(self, span: _Span, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive causal mask ``[query_len, kv_len]`` of a span, built once per batch."""
        key = (span.query_len, span.kv_len, dtype, device)
        found = self._masks.get(key)
        if found is None:
            found = torch.full((span.query_len, span.kv_len), -math.inf, dtype=dtype, device=device)
            found.triu_(span.kv_len - span.query_len + 1)
            self._masks[key] = found
        return found

    def gather(self, pages: Tensor, name: str) -> Tensor | None:
        """Pages of all scattered sequences in table order, or None where there are none.

        The buffer is one per ``name`` ("k" or "v") and reused by the next layer: fresh memory of
        that size costs several times the copy itself.
        """
        if not self._gathered_pages:
            return None
        index = self._index.get(pages.device)
        if index is None:
            index = torch.tensor(self._gathered_pages, dtype=torch.int64).to(pages.device)
            self._index[pages.device] = index
        shape = (len(self._gathered_pages), *pages.shape[1:])
        buffer = self._buffers.get(name)
        if buffer is None or (*buffer.shape, buffer.dtype) != (*shape, pages.dtype):
            buffer = self._buffers[name] = pages.new_empty(shape)
        return torch.index_select(pages, 0, index, out=buffer)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: PagedBatch | BatchTensors,
    scale: float,
) -> Tensor:
    """Attention of the batch's new tokens over their sequences' cached keys and values.

    Args:
        q: ``[T, heads, head_dim]``, the new tokens of all sequences, concatenated.
        k_pages, v_pages: ``[pages, page_size, kv_heads, head_dim]``; ``heads`` is a multiple of
            ``kv_heads``, and query head h reads kv head ``h // (heads // kv_heads)`` (GQA).
        batch: a `PagedBatch`; or, for a captured CUDA graph, static `BatchTensors`.
        scale: factor on the scores before the softmax, which is computed in float32.

    Returns:
        ``[T, heads, head_dim]`` in the dtype of ``q``.
    """
    if use_triton(q):
        tensors = batch.tensors_on(q.device) if isinstance(batch, PagedBatch) else batch
        return paged_attention_triton(q, k_pages, v_pages, tensors, scale)
    if not isinstance(batch, PagedBatch):
        raise TypeError("paged_attention: BatchTensors need a CUDA device and Triton")
    return paged_attention_torch(q, k_pages, v_pages, batch, scale)


def paged_attention_triton(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: BatchTensors, scale: float
) -> Tensor:
    """`paged_attention` with the two Triton kernels.

    A sequence with one new token always goes through the decode kernel, also in a mixed batch.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if batch.max_query_len > 1:
        paged_extend_triton(q, k_pages, v_pages, batch, scale, out)
    if batch.has_decode:
        paged_decode_triton(q, k_pages, v_pages, batch, scale, out)
    return out


def paged_attention_torch(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    """`paged_attention` in plain torch, sequence by sequence (the CPU path)."""
    spans = batch._spans
    if not spans:
        return torch.empty_like(q)
    keys, values = _Views(k_pages, batch, "k"), _Views(v_pages, batch, "v")
    if batch.all_decode:
        return _decode(q, spans, keys, values, scale)
    outputs = []
    for rows, span in zip(q.split([span.query_len for span in spans]), spans, strict=True):
        if span.query_len == 1:
            outputs.append(_decode(rows, [span], keys, values, scale))
            continue
        out = F.scaled_dot_product_attention(
            rows.transpose(0, 1).unsqueeze(0),
            keys.of(span).unsqueeze(0),
            values.of(span).unsqueeze(0),
            attn_mask=batch.mask(span, q.dtype, q.device) if span.masked else None,
            is_causal=span.is_causal,
            scale=scale,
            enable_gqa=keys.heads != q.shape[1],
        )
        outputs.append(out[0].transpose(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _decode(
    q: Tensor, spans: Sequence[_Span], keys: _Views, values: _Views, scale: float
) -> Tensor:
    """One new token per span: ``[T, heads, dim]`` to ``[T, heads, dim]``.

    The query heads of one kv head are the rows of one product, so keys are never expanded. In
    float32 three plain products beat the fused call by 2 us or more; 16-bit products are slow.
    """
    tokens, heads, dim = q.shape
    shape = (keys.heads, heads // keys.heads, dim)
    outputs = []
    if q.dtype == torch.float32:
        for row, span in zip((q * scale).view(tokens, *shape).unbind(0), spans, strict=True):
            weights = torch.softmax(torch.bmm(row, keys.of(span, transposed=True)), dim=-1)
            outputs.append(torch.bmm(weights, values.of(span)))
    else:
        for row, span in zip(q.view(tokens, 1, *shape).unbind(0), spans, strict=True):
            key, value = keys.of(span).unsqueeze(0), values.of(span).unsqueeze(0)
            outputs.append(F.scaled_dot_product_attention(row, key, value, scale=scale))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.reshape(tokens, heads, dim)


class _Views:
    """Keys (or values) of single sequences as views of the pool or of the gathered pages."""

    def __init__(self, pages: Tensor, batch: PagedBatch, name: str) -> None:
        _, size, self.heads, self.dim = pages.shape
        if size != batch.page_size:
            raise ValueError(f"the pool has pages of {size} slots, the batch of {batch.page_size}")
        if pages.stride(0) != size * pages.stride(1):
            pages = pages.contiguous()  # slots of neighbouring pages must be evenly spaced
        self.pool = (pages, pages.storage_offset(), *pages.stride()[1:])
        gathered = batch.gather(pages, name)
        self.gathered = (gathered, 0, self.heads * self.dim, self.dim, 1)

    def of(self, span: _Span, transposed: bool = False) -> Tensor:
        """``[kv_heads, kv_len, head_dim]``, or ``[kv_heads, head_dim, kv_len]`` if transposed.

        One `as_strided` costs 1 us where slicing costs 2.5.
        """
        source, base, row, head, element = self.gathered if span.gathered else self.pool
        start = base + span.start * row
        if transposed:
            return source.as_strided(
                (self.heads, self.dim, span.kv_len), (head, element, row), start
            )
        return source.as_strided((self.heads, span.kv_len, self.dim), (head, row, element), start)
