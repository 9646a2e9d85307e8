"""x @ weight.T + bias for a few rows: decoding at batch 1 to 8, where all that counts is how fast
the weight is read.

A program reads a strip of the weight's rows once, for all rows of x, and adds up in float32: one or
two rows by multiplying and adding lane by lane, more of them by matrix units, padded to 16. The
torch reference is `torch.nn.functional.linear`.

It runs where it was measured to be faster than the library, see `matvec_choice`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, triton
from mstar.engine.kernels.tuning import Choice, best

__all__ = [
    "MATVEC",
    "MOST_ROWS",
    "matvec_choice",
    "matvec_choices",
    "matvec_shape",
    "matvec_triton",
]

MATVEC = "matvec"
MOST_ROWS = 8
_ROWS = (1, 2, 4, 8)  # what is measured: decode steps come in such batches
_BY_LANE = 2  # rows; the sums of more do not fit into registers
_LANES = (
    Choice(BLOCK_N=8, BLOCK_K=512, num_warps=4),
    Choice(BLOCK_N=4, BLOCK_K=1024, num_warps=4),
    Choice(BLOCK_N=16, BLOCK_K=256, num_warps=4),
    Choice(BLOCK_N=16, BLOCK_K=512, num_warps=8),
)
_UNITS = (
    Choice(BLOCK_N=16, BLOCK_K=256, num_warps=4, num_stages=3),
    Choice(BLOCK_N=32, BLOCK_K=256, num_warps=4, num_stages=3),
    Choice(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=4),
)


def matvec_shape(rows: int, weight: Tensor) -> str:
    """What a choice is measured for."""
    return f"{weight.dtype} {rows}x{weight.shape[1]}x{weight.shape[0]}"


def matvec_choices(rows: int) -> Sequence[Choice]:
    """Tiles to try for so many rows."""
    return _LANES if rows <= _BY_LANE else _UNITS


def matvec_choice(x: Tensor, weight: Tensor) -> Choice | None:
    """The tile with which this product is faster than the library's, as measured; None if none is,
    or it was not measured."""
    rows = x.numel() // weight.shape[1]
    if triton is None or rows not in _ROWS or weight.dtype == torch.float32:
        return None
    if not weight.is_contiguous():
        return None

    def run(choice: Choice) -> Tensor:
        return matvec_triton(x, weight, None, choice) if choice else F.linear(x, weight)

    choices = ({}, *matvec_choices(rows))  # the first is the library
    return best(MATVEC, matvec_shape(rows, weight), choices, run, weight.device) or None


def matvec_triton(x: Tensor, weight: Tensor, bias: Tensor | None, choice: Choice) -> Tensor:
    """`[..., inputs]`, up to 8 rows in all, and a contiguous `[outputs, inputs]` to
    `[..., outputs]`."""
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs).contiguous()
    out = x.new_empty(len(rows), outputs)
    by_lane = len(rows) <= _BY_LANE
    _matvec_kernel[(triton.cdiv(outputs, choice["BLOCK_N"]),)](
        rows,
        weight,
        rows if bias is None else bias,
        out,
        outputs,
        inputs,
        ROWS=len(rows),
        BLOCK_M=next_power_of_2(len(rows)) if by_lane else 16,
        BY_LANE=by_lane,
        BIASED=bias is not None,
        **choice,
    )
    return out.view(*x.shape[:-1], outputs)


@jit
def _matvec_kernel(
    x,  # [ROWS, inputs]
    weight,  # [outputs, inputs]
    bias,  # [outputs], read where BIASED
    out,  # [ROWS, outputs]
    outputs,
    inputs,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_LANE: tl.constexpr,
    BIASED: tl.constexpr,
):
    """One program: BLOCK_N outputs of all rows."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    is_column, is_row = column < outputs, row < ROWS
    strip = weight + column.to(tl.int64)[:, None] * inputs + k[None, :]
    if BY_LANE:
        lanes = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, inputs, BLOCK_K):
            inside = start + k < inputs
            own = tl.load(strip + start, mask=is_column[:, None] & inside[None, :], other=0.0)
            mask = is_row[:, None] & inside[None, :]
            value = tl.load(x + row[:, None] * inputs + start + k[None, :], mask=mask, other=0.0)
            lanes += own.to(tl.float32)[None, :, :] * value.to(tl.float32)[:, None, :]
        total = tl.trans(tl.sum(lanes, axis=2))
    else:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, inputs, BLOCK_K):
            inside = start + k < inputs
            own = tl.load(strip + start, mask=is_column[:, None] & inside[None, :], other=0.0)
            mask = is_row[None, :] & inside[:, None]
            value = tl.load(x + row[None, :] * inputs + start + k[:, None], mask=mask, other=0.0)
            total = tl.dot(own, value, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[:, None]
    target = out + row[None, :] * outputs + column[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=is_column[:, None] & is_row[None, :])
