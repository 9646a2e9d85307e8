"""Layer norm, alone or fused with the residual addition before it.

    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

(Ba, Kiros & Hinton 2016, equation 4; the variance is that of the population.) Everything is float32
up to the one rounding at the end, as in torch.
"""

from __future__ import annotations

from typing import overload

import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, tl, use_triton
from mstar.engine.kernels.norm_rows import norm_rows

__all__ = ["layer_norm", "layer_norm_torch", "layer_norm_triton"]


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: None = None
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Norm of `x` over its last dimension, times `weight`, plus `bias`.

    Args:
        x: `[..., hidden]`.
        weight, bias: `[hidden]` in the dtype of `x`, or float32.
        eps: added to the variance.
        residual: like `x`; where given, `x + residual` is normed instead.

    Returns:
        The normed tensor; with `residual`, `(normed, x + residual)`.
    """
    compute = layer_norm_triton if use_triton(x) else layer_norm_torch
    return compute(x, weight, bias, eps, residual)


def layer_norm_torch(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm` in plain torch."""
    total = x if residual is None else x + residual
    normed = F.layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)
    return normed if residual is None else (normed, total)


def layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm` as one Triton kernel: each element is read once and written once."""
    return norm_rows(_layer_norm_kernel, x, residual, (weight, bias), eps)


@jit(varying=("num_rows",))
def _layer_norm_kernel(
    x,  # [rows, HIDDEN]
    residual,  # [rows, HIDDEN], read where FUSED
    weight,  # [HIDDEN]
    bias,  # [HIDDEN]
    out,  # [rows, HIDDEN], contiguous
    total,  # [rows, HIDDEN], contiguous, written where FUSED
    num_rows,
    eps,
    x_stride,
    residual_stride,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FUSED: tl.constexpr,
):
    """One program: ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < HIDDEN
    mask = (row < num_rows) & inside
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if FUSED:
        added = tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(total + row * HIDDEN + column, value, mask=mask)
    wide = value.to(tl.float32)
    mean = tl.sum(wide, axis=1) / HIDDEN
    centred = tl.where(mask, wide - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / HIDDEN
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    normed = centred * tl.rsqrt(variance + eps)[:, None] * scale + shift
    tl.store(out + row * HIDDEN + column, normed.to(value.dtype), mask=mask)
