"""Rows of 8-bit numbers and a scale for each: the largest of a row becomes the largest there is.

Tokens are rounded to e4m3 (Micikevicius et al. 2022, arXiv 2209.05433, section 3) one by one while
a model runs, weights to it or to int8 when they are loaded. A row of zeros has the least scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, use_triton

__all__ = ["FP8", "quantize_rows", "quantize_rows_torch", "quantize_rows_triton"]

FP8 = torch.float8_e4m3fn
_MOST = {FP8: 448.0, torch.int8: 127.0}
_LEAST = 1e-30


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 `[rows, width]` and float32 scales `[rows]`, whose product is about `x`."""
    return quantize_rows_triton(x) if use_triton(x) else quantize_rows_torch(x)


def quantize_rows_torch(x: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in plain torch, also to int8."""
    wide = x.float()
    scales = (wide.abs().amax(-1) / _MOST[dtype]).clamp_min(_LEAST)
    values = wide / scales.unsqueeze(-1)
    return (values if dtype == FP8 else values.round_()).to(dtype), scales


def quantize_rows_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` as one Triton kernel; rows may lie inside wider ones."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, width = x.shape
    values = torch.empty(rows, width, dtype=FP8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = min(4096, next_power_of_2(width))
        _quantize_rows_kernel[(rows,)](
            x, values.view(torch.uint8), scales, x.stride(0), WIDTH=width, BLOCK=block, num_warps=4
        )
    return values, scales


@jit
def _quantize_rows_kernel(
    x,  # [rows, WIDTH]
    values,  # [rows, WIDTH], as uint8
    scales,  # [rows]
    row_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    source = x + row * row_stride + place
    tops = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        value = tl.load(source + start, mask=start + place < WIDTH, other=0.0).to(tl.float32)
        tops = tl.maximum(tops, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
    nans = tl.sum((tops != tops).to(tl.int32), axis=0)  # which a maximum may leave out
    top = tl.where(nans > 0, float("nan"), tl.max(tops, axis=0))
    scale = tl.maximum(tl.div_rn(top, 448.0), 1e-30, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scales + row, scale)
    for start in range(0, WIDTH, BLOCK):
        inside = start + place < WIDTH
        value = tl.load(source + start, mask=inside, other=0.0).to(tl.float32)
        tl.store(values + row * WIDTH + start + place, _e4m3(tl.div_rn(value, scale)), mask=inside)


@jit
def _e4m3(x):
    """The bits of the nearest e4m3, ties to even, of float32 up to 448: the same on every GPU."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    least = (size * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xF  # in steps of 2^-9
    code = tl.where(size < 0.015625, least, normal)
    return tl.where(x < 0, code | 0x80, code).to(tl.uint8)
