"""Attention of several new tokens per sequence over a paged cache (prefill and extension).

Blocks of queries loop over blocks of keys through the block table with an online softmax (Dao 2023,
FlashAttention-2, algorithm 1). The rows of a block are (query, head of the group) pairs, so a key
is read once for all query heads of its kv head and any group size works without padding. Blocks of
keys that all rows see come first, in a loop without masks. The torch reference is
`paged_attention_torch`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, triton
from mstar.engine.kernels.paged_batch import FEW, FEW_KEYS, BatchTensors
from mstar.engine.kernels.paged_block import attend_block
from mstar.engine.kernels.paged_tiles import EXTEND, block_keys, tile_for
from mstar.engine.kernels.tuning import Choice

__all__ = ["paged_extend_triton"]


def paged_extend_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: BatchTensors,
    scale: float,
    out: Tensor | None = None,
    tile: Choice | None = None,
) -> Tensor:
    """`paged_attention` for the sequences of a batch that have more than one new token and are not
    in `batch.few`.

    Rows of ``out`` that belong to other sequences are left as they are.
    """
    _, heads, dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    group = heads // kv_heads
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    tile = tile or tile_for(EXTEND, q, k_pages, v_pages, paged_extend_triton)
    blocks = triton.cdiv(batch.max_query_len * group, tile["BLOCK_M"])
    sequences = len(batch.kv_len)
    if not blocks or not sequences:
        return out
    _extend_kernel[(blocks, kv_heads, sequences)](
        q,
        k_pages,
        v_pages,
        out,
        batch.query_start,
        batch.kv_len,
        batch.causal,
        batch.block_table,
        scale * math.log2(math.e),
        *q.stride()[:2],
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        *out.stride()[:2],
        batch.block_table.stride(0),
        1 if batch.few is None else FEW,
        FEW_KEYS=FEW_KEYS,
        GROUP=group,
        DIM=dim,
        PAGE_SIZE=page_size,
        BLOCK_N=block_keys(q),
        BLOCK_D=max(16, next_power_of_2(dim)),
        **tile,
    )
    return out


@jit
def _rows(start, first, kv_head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Each row's place among the new tokens, its token and its head."""
    row = start + tl.arange(0, BLOCK_M)
    query_index = row // GROUP
    return query_index, first.to(tl.int64) + query_index, kv_head * GROUP + row % GROUP


@jit(varying=("table_stride", "few"))
def _extend_kernel(
    q,  # [tokens, heads, DIM]
    k_pages,  # [pages, PAGE_SIZE, kv_heads, DIM]
    v_pages,
    out,  # [tokens, heads, DIM]
    query_start,
    kv_lens,
    causal,
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
    out_token_stride,
    out_head_stride,
    table_stride,
    few,  # new tokens up to which a sequence with FEW_KEYS keys is decoded
    FEW_KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_M (query, head) rows of one sequence and one kv head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # longest causal rows first
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    first = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - first
    kv_len = tl.load(kv_lens + sequence)
    decoded = (length == 1) | ((length <= few) & (kv_len >= FEW_KEYS))
    if decoded | (block * BLOCK_M >= length * GROUP):
        return
    is_causal = tl.load(causal + sequence)

    query_index, token, head = _rows(block * BLOCK_M, first, kv_head, GROUP, BLOCK_M)
    is_row = query_index < length
    column = tl.arange(0, BLOCK_D)
    inside = column < DIM
    row_mask = is_row[:, None] & inside[None, :]
    source = q + token * q_token_stride + head * q_head_stride
    query = tl.load(source[:, None] + column[None, :], mask=row_mask, other=0.0)

    # Each row sees keys 0 .. seen - 1, those of the first `whole` blocks in any case.
    seen = tl.where((is_causal != 0) & is_row, kv_len - length + query_index + 1, kv_len)
    first_row = block * BLOCK_M // GROUP
    last_row = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, length - 1)
    all_see = tl.where(is_causal != 0, kv_len - length + first_row + 1, kv_len)
    end = tl.where(is_causal != 0, kv_len - length + last_row + 1, kv_len)
    whole = all_see // BLOCK_N * BLOCK_N

    k_pages += kv_head * k_head_stride
    v_pages += kv_head * v_head_stride
    table = block_table + sequence * table_stride
    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, whole, BLOCK_N):
        peak, total, acc = attend_block(
            query,
            peak,
            total,
            acc,
            start,
            end,
            seen,
            k_pages,
            v_pages,
            table,
            scale_log2,
            k_page_stride,
            k_slot_stride,
            v_page_stride,
            v_slot_stride,
            DIM,
            PAGE_SIZE,
            BLOCK_N,
            BLOCK_D,
            MASKED=False,
        )
    for start in tl.range(whole, end, BLOCK_N, num_stages=1):
        peak, total, acc = attend_block(
            query,
            peak,
            total,
            acc,
            start,
            end,
            seen,
            k_pages,
            v_pages,
            table,
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

    # Worked out again from what is read again: kept during the loops it would not fit in registers.
    again = tl.load(query_start + sequence, volatile=True)
    query_index, token, head = _rows(
        block * BLOCK_M + again - first, again, kv_head, GROUP, BLOCK_M
    )
    row_mask = (query_index < length)[:, None] & inside[None, :]
    target = out + token * out_token_stride + head * out_head_stride
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(target[:, None] + column[None, :], result, mask=row_mask)
