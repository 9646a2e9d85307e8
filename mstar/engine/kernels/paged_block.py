"""One block of keys of the attention kernels: read through the block table, online softmax."""

from __future__ import annotations

from mstar.engine.kernels.dispatch import jit, tl

__all__ = ["attend_block"]


@jit
def attend_block(
    query,  # [rows, BLOCK_D]
    peak,  # [rows] float32: largest score so far, base 2; finite from the beginning
    total,  # [rows] float32: sum of 2 ** (score - peak)
    acc,  # [rows, BLOCK_D] float32: values weighted alike
    start,  # of the block, in the sequence
    end,  # keys from here on are not read
    seen,  # [rows], or one for all: how many keys of the sequence a row sees
    k_pages,  # of the kv head
    v_pages,
    table,  # of the sequence
    scale_log2,
    k_page_stride,
    k_slot_stride,
    v_page_stride,
    v_slot_stride,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,  # whether `end` and `seen` are heeded
):
    """`peak, total, acc` with the block's keys (Dao 2023, FlashAttention-2, algorithm 1).

    The scale, which must be positive, is applied with the subtraction of the peak, in one
    instruction.
    """
    position = start + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    if MASKED:
        valid = position < end
        page = tl.load(table + position // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
        there = valid[:, None] & (column < DIM)[None, :]
    else:
        page = tl.load(table + position // PAGE_SIZE).to(tl.int64)
        there = tl.full([BLOCK_N, 1], True, tl.int1) & (column < DIM)[None, :]
    offset = position % PAGE_SIZE
    k_rows = k_pages + page * k_page_stride + offset * k_slot_stride
    v_rows = v_pages + page * v_page_stride + offset * v_slot_stride
    if MASKED or DIM < BLOCK_D:
        key = tl.load(k_rows[:, None] + column[None, :], mask=there, other=0.0)
    else:
        key = tl.load(k_rows[:, None] + column[None, :])
    score = tl.dot(query, tl.trans(key), input_precision="ieee")
    if MASKED:
        visible = valid[None, :] & (position[None, :] < seen[:, None])
        score = tl.where(visible, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, axis=1) * scale_log2)
    weight = tl.exp2(score * scale_log2 - new_peak[:, None])
    fade = tl.exp2(peak - new_peak)
    if MASKED or DIM < BLOCK_D:
        value = tl.load(v_rows[:, None] + column[None, :], mask=there, other=0.0)
    else:
        value = tl.load(v_rows[:, None] + column[None, :])
    total = total * fade + tl.sum(weight, axis=1)
    acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
    return new_peak, total, acc
