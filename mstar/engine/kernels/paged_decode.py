"""Decode attention over a paged cache, split over the sequence (flash-decoding).

One new token per sequence reads a long cache: the cache is cut into chunks that different programs
read, each with an online softmax (Dao et al. 2022, FlashAttention, section 3.1), and a second small
kernel combines the partial results by their log-sum-exps (Dao et al. 2023, "Flash-Decoding for
long-context inference"). The query heads of one kv head are the rows of one matrix product, so a
key is read once for all of them.

How a sequence is cut depends on its own length alone, so its result does not depend on the batch;
the launch grid depends on shapes alone, so a captured CUDA graph serves every length that the block
table can hold. The torch reference is `paged_attention_torch`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl
from mstar.engine.kernels.paged_batch import BatchTensors
from mstar.engine.kernels.paged_tiles import DECODE, block_keys, tile_for
from mstar.engine.kernels.tuning import Choice

__all__ = ["paged_decode_triton"]

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
    _, heads, dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    sequences = len(batch.block_table)
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if not sequences:
        return out
    # Enough splits that one sequence alone fills a large GPU; a property of the model, for another
    # kernel is compiled for every number.
    splits = min(_MOST, max(_FEWEST, next_power_of_2(128 // kv_heads or 1)))
    log_sums = torch.empty(sequences, heads, splits, dtype=torch.float32, device=q.device)
    partial = torch.empty(*log_sums.shape, dim, dtype=torch.float32, device=q.device)
    block_d = max(16, next_power_of_2(dim))
    tile = tile or tile_for(DECODE, q, k_pages, v_pages, paged_decode_triton)
    _decode_kernel[(sequences, kv_heads, splits)](
        q,
        k_pages,
        v_pages,
        partial,
        log_sums,
        batch.query_start,
        batch.kv_len,
        batch.block_table,
        scale * math.log2(math.e),
        *q.stride()[:2],
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        batch.block_table.stride(0),
        GROUP=heads // kv_heads,
        DIM=dim,
        PAGE_SIZE=page_size,
        MIN_CHUNK=min_chunk,
        BLOCK_G=max(16, next_power_of_2(heads // kv_heads)),
        BLOCK_N=block_keys(q),
        BLOCK_D=block_d,
        **tile,
    )
    _combine_kernel[(sequences, heads)](
        partial,
        log_sums,
        out,
        batch.query_start,
        *out.stride()[:2],
        DIM=dim,
        SPLITS=splits,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out


@jit(varying=("table_stride",))
def _decode_kernel(
    q,  # [tokens, heads, DIM]
    k_pages,  # [pages, PAGE_SIZE, KV_HEADS, DIM]
    v_pages,
    partial,  # [sequences, heads, splits, DIM] float32
    log_sums,  # [sequences, heads, splits] float32, base 2; -inf: unused split
    query_start,
    kv_lens,
    block_table,
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
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one kv head over one chunk of one sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split, splits = tl.program_id(2), tl.num_programs(2)
    token = tl.load(query_start + sequence).to(tl.int64)
    if tl.load(query_start + sequence + 1) != token + 1:
        return
    kv_len = tl.load(kv_lens + sequence)
    chunk = tl.maximum(MIN_CHUNK, tl.cdiv(tl.cdiv(kv_len, splits), BLOCK_N) * BLOCK_N)
    begin = split * chunk
    end = tl.minimum(begin + chunk, kv_len)

    member = tl.arange(0, BLOCK_G)
    head = kv_head * GROUP + member
    is_head = member < GROUP
    row = (sequence * tl.num_programs(1) * GROUP + head) * splits + split
    if begin >= kv_len:
        tl.store(log_sums + row, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=is_head)
        return
    column = tl.arange(0, BLOCK_D)
    inside = column < DIM
    row_mask = is_head[:, None] & inside[None, :]
    source = q + token * q_token_stride + head[:, None] * q_head_stride + column[None, :]
    query = tl.load(source, mask=row_mask, other=0.0)

    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        valid = position < end
        entry = block_table + sequence * table_stride + position // PAGE_SIZE
        page = tl.load(entry, mask=valid, other=0).to(tl.int64)
        offset = position % PAGE_SIZE
        kv_mask = valid[:, None] & inside[None, :]
        k_rows = k_pages + page * k_page_stride + offset * k_slot_stride + kv_head * k_head_stride
        key = tl.load(k_rows[:, None] + column[None, :], mask=kv_mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        score = tl.where(valid[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        weight = tl.exp2(score - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        v_rows = v_pages + page * v_page_stride + offset * v_slot_stride + kv_head * v_head_stride
        value = tl.load(v_rows[:, None] + column[None, :], mask=kv_mask, other=0.0)
        total = total * fade + tl.sum(weight, axis=1)
        acc = acc * fade[:, None]
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision="ieee")
        peak = new_peak

    tl.store(log_sums + row, peak + tl.log2(total), mask=is_head)
    target = partial + row[:, None] * DIM + column[None, :]
    tl.store(target, acc / total[:, None], mask=row_mask)


@jit
def _combine_kernel(
    partial,  # [sequences, heads, SPLITS, DIM] float32
    log_sums,  # [sequences, heads, SPLITS] float32, base 2; -inf: unused split
    out,  # [tokens, heads, DIM]
    query_start,
    out_token_stride,
    out_head_stride,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one query head of one sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.load(query_start + sequence).to(tl.int64)
    if tl.load(query_start + sequence + 1) != token + 1:
        return
    column = tl.arange(0, BLOCK_D)
    row = (sequence * tl.num_programs(1) + head) * SPLITS + tl.arange(0, SPLITS)
    log_sum = tl.load(log_sums + row)
    weight = tl.exp2(log_sum - tl.max(log_sum, axis=0))
    mask = (weight > 0)[:, None] & (column < DIM)[None, :]
    part = tl.load(partial + row[:, None] * DIM + column[None, :], mask=mask, other=0.0)
    result = tl.sum(part * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    target = out + token * out_token_stride + head * out_head_stride + column
    tl.store(target, result.to(out.dtype.element_ty), mask=column < DIM)
