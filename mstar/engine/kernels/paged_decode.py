"""Decode attention over a paged cache, split over the sequence (flash-decoding).

One new token per sequence, or a few, read a long cache: the cache is cut into chunks that different
programs read, each with an online softmax (Dao et al. 2022, FlashAttention, section 3.1), and a
second small kernel combines the partial results by their log-sum-exps (Dao et al. 2023,
"Flash-Decoding for long-context inference"). The rows of one matrix product are the query heads of
one kv head, so a key is read once for all of them: those of a sequence's new tokens, and, where
each has but one, those of forks that share the chunk's pages (see `paged_shared`).

How a sequence is cut depends on its own length alone, so its result does not depend on the batch;
the launch grid depends on shapes alone, so a captured CUDA graph serves every length that the block
table can hold. The torch reference is `paged_attention_torch`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl
from mstar.engine.kernels.paged_batch import FEW, FEW_KEYS, BatchTensors
from mstar.engine.kernels.paged_block import attend_block
from mstar.engine.kernels.paged_shared import ROWS, forks_together, with_shared
from mstar.engine.kernels.paged_tiles import DECODE, DECODE_FEW, block_keys, tile_for
from mstar.engine.kernels.tuning import Choice

__all__ = ["paged_decode_few_triton", "paged_decode_triton"]

_MIN_CHUNK = 256  # tokens; shorter chunks cost more in combining than they win
_FEWEST, _MOST = 8, 64  # chunks of a sequence


def paged_decode_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: BatchTensors,
    scale: float,
    out: Tensor | None = None,
    min_chunk: int = _MIN_CHUNK,
    tile: Choice | None = None,
) -> Tensor:
    """`paged_attention` for the sequences of a batch that have exactly one new token.

    Rows of ``out`` that belong to other sequences are left as they are.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if not len(batch.block_table) or not batch.has_decode:
        return out
    tile = tile or tile_for(DECODE, q, k_pages, v_pages, paged_decode_triton)
    batch = with_shared(batch, q, k_pages)
    _launch(q, k_pages, v_pages, batch, scale, out, min_chunk, tile, few=False)
    return out


def paged_decode_few_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: BatchTensors,
    scale: float,
    out: Tensor | None = None,
    min_chunk: int = _MIN_CHUNK,
    tile: Choice | None = None,
) -> Tensor:
    """`paged_attention` for the sequences of a batch in `batch.few`, except those that have too few
    keys after all.

    Rows of ``out`` that belong to other sequences are left as they are.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if batch.few is None:
        return out
    tile = tile or tile_for(DECODE_FEW, q, k_pages, v_pages, paged_decode_few_triton)
    _launch(q, k_pages, v_pages, batch, scale, out, min_chunk, tile, few=True)
    return out


def _launch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: BatchTensors,
    scale: float,
    out: Tensor,
    min_chunk: int,
    tile: Choice,
    few: bool,
) -> None:
    _, heads, dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    group = heads // kv_heads
    rows = batch.few.rows if few else None
    count = len(rows) if few else len(batch.kv_len)
    queries = FEW if few else 1
    # Enough splits that one sequence alone fills a large GPU; a property of the model, for another
    # kernel is compiled for every number.
    splits = min(_MOST, max(_FEWEST, next_power_of_2(128 // kv_heads or 1)))
    shape = batch.few.tokens if few else count, heads, splits
    log_sums = torch.empty(shape, dtype=torch.float32, device=q.device)
    partial = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
    block_d = max(16, next_power_of_2(dim))
    _decode_kernel[(count, kv_heads, splits)](
        q,
        k_pages,
        v_pages,
        partial,
        log_sums,
        batch.query_start,
        batch.kv_len,
        batch.causal,
        batch.block_table,
        rows,
        None if few else batch.shared,
        scale * math.log2(math.e),
        *q.stride()[:2],
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        batch.block_table.stride(0),
        GROUP=group,
        QUERIES=queries,
        TOGETHER=1 if few else forks_together(q, k_pages),
        FEW_KEYS=FEW_KEYS,
        DIM=dim,
        PAGE_SIZE=page_size,
        MIN_CHUNK=min_chunk,
        BLOCK_G=max(ROWS, next_power_of_2(group * queries)),
        BLOCK_N=block_keys(q),
        BLOCK_D=block_d,
        **tile,
    )
    _combine_kernel[(count * queries, heads)](
        partial,
        log_sums,
        out,
        batch.query_start,
        batch.kv_len,
        rows,
        *out.stride()[:2],
        QUERIES=queries,
        FEW_KEYS=FEW_KEYS,
        DIM=dim,
        SPLITS=splits,
        BLOCK_D=block_d,
        num_warps=4,
    )


@jit
def _chunk(kv_len, splits, MIN_CHUNK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys of a chunk."""
    return tl.maximum(MIN_CHUNK, tl.cdiv(tl.cdiv(kv_len, splits), BLOCK_N) * BLOCK_N)


@jit
def _work(index, few, query_start, kv_lens, QUERIES: tl.constexpr, FEW_KEYS: tl.constexpr):
    """Sequence, its first token, number of new tokens (0: nothing to do), keys, and the first of
    its rows in `partial`."""
    if QUERIES == 1:
        sequence, row = index.to(tl.int64), index.to(tl.int64)
    else:
        sequence = tl.load(few + 2 * index).to(tl.int64)
        row = tl.load(few + 2 * index + 1).to(tl.int64)
    token = tl.load(query_start + sequence).to(tl.int64)
    length = tl.load(query_start + sequence + 1) - token
    kv_len = tl.load(kv_lens + sequence)
    if QUERIES == 1:
        length = tl.where(length == 1, length, 0)
    else:
        length = tl.where((length > 1) & (length <= QUERIES) & (kv_len >= FEW_KEYS), length, 0)
    return sequence, token, length, kv_len, row


@jit(varying=("table_stride",))
def _decode_kernel(
    q,  # [tokens, heads, DIM]
    k_pages,  # [pages, PAGE_SIZE, KV_HEADS, DIM]
    v_pages,
    partial,  # [rows, heads, splits, DIM] float32
    log_sums,  # [rows, heads, splits] float32, base 2; -inf: unused split
    query_start,
    kv_lens,
    causal,
    block_table,
    few,  # see `Few`; None where QUERIES is 1
    shared,  # see `paged_shared`; None where QUERIES is not 1
    scale_log2,
    q_token_stride,
    q_head_stride,
    k_page_stride,
    k_slot_stride,
    k_head_stride,
    v_page_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    TOGETHER: tl.constexpr,
    FEW_KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one kv head over one chunk of one sequence."""
    index = tl.program_id(0)
    kv_head = tl.program_id(1)
    split, splits = tl.program_id(2), tl.num_programs(2)
    sequence, token, length, kv_len, row = _work(
        index, few, query_start, kv_lens, QUERIES, FEW_KEYS
    )
    if length == 0:
        return
    chunk = _chunk(kv_len, splits, MIN_CHUNK, BLOCK_N)
    begin = split * chunk
    end = tl.minimum(begin + chunk, kv_len)

    member = tl.arange(0, BLOCK_G)
    place = member // GROUP  # which of the sequence's new tokens, or of the forks
    head = kv_head * GROUP + member % GROUP
    is_row = place < length
    tokens, rows = token + place, row + place
    seen = tl.full([BLOCK_G], kv_len, tl.int32)
    if QUERIES > 1:
        if tl.load(causal + sequence) != 0:
            seen = kv_len - length.to(tl.int32) + place + 1
    elif TOGETHER > 1:
        first = sequence // TOGETHER * TOGETHER
        alike = chunk == _chunk(tl.load(kv_lens + first), splits, MIN_CHUNK, BLOCK_N)
        if alike & (begin + chunk <= tl.load(shared + sequence)):
            return  # the first one does it
        fork = sequence + place
        last = tl.where(sequence == first, tl.minimum(first + TOGETHER, tl.num_programs(0)), 0)
        may = (place > 0) & (fork < last)
        tokens = tl.load(query_start + fork, mask=may | is_row, other=0).to(tl.int64)
        alike = chunk == _chunk(
            tl.load(kv_lens + fork, mask=may, other=0), splits, MIN_CHUNK, BLOCK_N
        )
        common = tl.load(shared + fork, mask=may, other=0)
        is_row |= may & alike & (begin + chunk <= common)

    rows = (rows * tl.num_programs(1) * GROUP + head) * splits + split
    if begin >= kv_len:
        tl.store(log_sums + rows, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=is_row)
        return
    column = tl.arange(0, BLOCK_D)
    row_mask = is_row[:, None] & (column < DIM)[None, :]
    source = q + tokens[:, None] * q_token_stride + head[:, None] * q_head_stride
    query = tl.load(source + column[None, :], mask=row_mask, other=0.0)

    peak = tl.full([BLOCK_G], -1e30, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        peak, total, acc = attend_block(
            query,
            peak,
            total,
            acc,
            start,
            end,
            seen,
            k_pages + kv_head * k_head_stride,
            v_pages + kv_head * v_head_stride,
            block_table + sequence * table_stride,
            scale_log2,
            k_page_stride,
            k_slot_stride,
            v_page_stride,
            v_slot_stride,
            DIM,
            PAGE_SIZE,
            BLOCK_N,
            BLOCK_D,
            MASKED=True,
        )

    if QUERIES > 1:  # the first of a few may see nothing of the last chunk
        total = tl.where(seen > begin, total, 1.0)
        peak = tl.where(seen > begin, peak, float("-inf"))
    tl.store(log_sums + rows, peak + tl.log2(total), mask=is_row)
    target = partial + rows[:, None] * DIM + column[None, :]
    tl.store(target, acc / total[:, None], mask=row_mask)


@jit
def _combine_kernel(
    partial,  # [rows, heads, SPLITS, DIM] float32
    log_sums,  # [rows, heads, SPLITS] float32, base 2; -inf: unused split
    out,  # [tokens, heads, DIM]
    query_start,
    kv_lens,
    few,
    out_token_stride,
    out_head_stride,
    QUERIES: tl.constexpr,
    FEW_KEYS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one query head of one token."""
    index, place = tl.program_id(0) // QUERIES, tl.program_id(0) % QUERIES
    head = tl.program_id(1)
    _, token, length, _, row = _work(index, few, query_start, kv_lens, QUERIES, FEW_KEYS)
    if place >= length:
        return
    column = tl.arange(0, BLOCK_D)
    rows = ((row + place) * tl.num_programs(1) + head) * SPLITS + tl.arange(0, SPLITS)
    log_sum = tl.load(log_sums + rows)
    weight = tl.exp2(log_sum - tl.max(log_sum, axis=0))
    mask = (weight > 0)[:, None] & (column < DIM)[None, :]
    part = tl.load(partial + rows[:, None] * DIM + column[None, :], mask=mask, other=0.0)
    result = tl.sum(part * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    target = out + (token + place) * out_token_stride + head * out_head_stride + column
    tl.store(target, result.to(out.dtype.element_ty), mask=column < DIM)
