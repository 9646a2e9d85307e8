"""x @ weight.T + bias with weights of 8 bits and a scale for each of their rows.

Up to 64 rows of x go through a kernel that reads the weight as it is stored, which is what such
products wait for; it widens tiles to what matrix units multiply, without loss, and adds up in
float32. More rows in bfloat16 go to the library: e4m3 as it is, where the library can do that, int8
after it was widened whole.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, triton, use_triton
from mstar.engine.kernels.onednn import has_onednn, product
from mstar.engine.kernels.quantize_rows import FP8
from mstar.engine.kernels.tuning import Choice, best

__all__ = [
    "WARM_ROWS",
    "library_takes",
    "scaled_product",
    "scaled_product_library",
    "scaled_product_torch",
    "scaled_product_triton",
]

_FEW = 64
WARM_ROWS = (16, 32, _FEW, _FEW + 1)  # they need every height of a tile, and the library
_TILES = (
    Choice(BLOCK_N=32, BLOCK_K=128, num_warps=4, num_stages=2),
    Choice(BLOCK_N=16, BLOCK_K=256, num_warps=4, num_stages=3),
    Choice(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3),
)
_STRIP = 1 << 20  # elements of a weight that the torch path widens at a time: they stay in a cache


def scaled_product(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    x_scales: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`(x * x_scales) @ (weight * scales).T + bias`.

    Args:
        x: `[rows, inputs]`; e4m3 with `x_scales`, floating-point without.
        weight: int8 or e4m3, `[outputs, inputs]`, contiguous.
        scales: float32 `[outputs]`.
        bias: `[outputs]`.
        x_scales: float32 `[rows]`.
        dtype: of the result.

    Returns:
        `[rows, outputs]`.
    """
    given = (x, weight, scales, bias, x_scales, dtype)
    if not use_triton(x):
        return scaled_product_torch(*given)
    if len(x) > _FEW and library_takes(weight, dtype):
        return scaled_product_library(*given)
    return scaled_product_triton(*given)


def library_takes(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the library's product can be used: float16 may overflow before it is scaled, and fp8
    is multiplied in pieces of 16, where the library can scale rows of it."""
    if dtype != torch.bfloat16:
        return False
    if weight.dtype == torch.int8:
        return True
    return not any(size % 16 for size in weight.shape) and _library_scales_rows(weight.device)


@cache
def _library_scales_rows(device: torch.device) -> bool:
    """Whether torch has products of fp8 with a scale for every row there, which depends on the GPU
    and on how torch was built."""
    x, scales = torch.zeros(16, 16, device=device).to(FP8), torch.ones(16, device=device)
    try:
        scaled_product_library(x, x, scales, None, scales, torch.bfloat16)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def scaled_product_library(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    x_scales: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`scaled_product` by torch's products, for many rows of bfloat16."""
    if x_scales is not None:
        sides = (x_scales.unsqueeze(1), scales.unsqueeze(0))
        return torch._scaled_mm(x, weight.t(), *sides, bias=bias, out_dtype=dtype)
    y = F.linear(x, weight.to(x.dtype)) * scales
    return (y if bias is None else y + bias).to(dtype)


def scaled_product_torch(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    x_scales: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`scaled_product` in plain torch. Sums are float32; a strip of the weight is widened at a
    time."""
    x = _wide(x)
    multiply = product if has_onednn(x) else F.linear
    out = x.new_empty(len(x), len(weight))
    step = max(1, _STRIP // weight.shape[1])
    for start in range(0, len(weight), step):
        out[:, start : start + step] = multiply(x, _wide(weight[start : start + step]))
    out *= scales
    if x_scales is not None:
        out *= x_scales.unsqueeze(1)
    if bias is not None:
        out += bias
    return out.to(dtype)


def _wide(x: Tensor) -> Tensor:
    """As float32. e4m3 becomes float16 by moving its bits, 256 times too small: torch's own way
    takes 10 times as long on a CPU."""
    if x.dtype != torch.float8_e4m3fn:
        return x.float()
    bits = (x.view(torch.int8).to(torch.int16) << 7) & ~0x4000
    return bits.view(torch.float16).float().mul_(256)


def scaled_product_triton(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    x_scales: Tensor | None,
    dtype: torch.dtype,
    choice: Choice | None = None,
) -> Tensor:
    """`scaled_product` as one Triton kernel.

    Args:
        choice: the tile; what was measured to be the fastest if left out.
    """
    (rows, inputs), outputs = x.shape, len(weight)
    x = x.contiguous()
    size = min(_FEW, max(16, next_power_of_2(rows)))

    def run(choice: Choice) -> Tensor:
        out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
        grid = triton.cdiv(outputs, choice["BLOCK_N"]), triton.cdiv(rows, size)
        _scaled_product_kernel[grid](
            x, weight, scales, bias, x_scales, out, rows, outputs, inputs, BLOCK_M=size, **choice
        )
        return out

    if not rows:
        return torch.empty(rows, outputs, dtype=dtype, device=x.device)
    shape = f"{x.dtype} {weight.dtype} {size}x{inputs}x{outputs}"
    return run(choice or best("scaled_product", shape, _TILES, run, x.device))


@jit
def widened(x, dtype: tl.constexpr):
    """8-bit numbers as those that matrix units multiply; int8 and e4m3 lose nothing by it."""
    return x.to(tl.float16 if dtype == tl.float8e4nv else dtype)


@jit(varying=("rows",))
def _scaled_product_kernel(
    x,  # [rows, inputs], contiguous, as is everything
    weight,  # [outputs, inputs]
    scales,  # [outputs] float32
    bias,  # [outputs], or None
    x_scales,  # [rows] float32, or None
    out,  # [rows, outputs]
    rows,
    outputs,
    inputs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_N outputs of BLOCK_M rows."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    is_column, is_row = column < outputs, row < rows
    source = x + row.to(tl.int64)[:, None] * inputs + k[None, :]
    matrix = weight + column.to(tl.int64)[None, :] * inputs + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        inside = start + k < inputs
        value = tl.load(source + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        own = tl.load(matrix + start, mask=inside[:, None] & is_column[None, :], other=0.0)
        value = widened(value, x.dtype.element_ty)
        own = widened(own, x.dtype.element_ty)
        total = tl.dot(value, own, total, input_precision="ieee")
    total *= tl.load(scales + column, mask=is_column, other=0.0)[None, :]
    if x_scales is not None:
        total *= tl.load(x_scales + row, mask=is_row, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    target = out + row.to(tl.int64)[:, None] * outputs + column[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)
