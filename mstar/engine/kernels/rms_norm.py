"""Root-mean-square norm, alone or fused with the residual addition before it.

    rms_norm(x) = cast(x / sqrt(mean(x^2) + eps)) * weight

(Zhang & Sennrich 2019, equation 4.) Statistics are float32; the quotient is rounded to the dtype of
``x`` before it meets the weight, the convention of Llama's published code.
"""

from __future__ import annotations

from typing import overload

import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, tl, use_triton
from mstar.engine.kernels.norm_rows import norm_rows

__all__ = ["rms_norm", "rms_norm_torch", "rms_norm_triton"]


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Norm of ``x`` over its last dimension, times ``weight``.

    Args:
        x: ``[..., hidden]``.
        weight: ``[hidden]`` in the dtype of ``x``.
        eps: added to the mean square.
        residual: like ``x``; where given, ``x + residual`` is normed instead.

    Returns:
        The normed tensor; with ``residual``, ``(normed, x + residual)``.
    """
    compute = rms_norm_triton if use_triton(x) else rms_norm_torch
    return compute(x, weight, eps, residual)


def rms_norm_torch(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm` in plain torch."""
    total = x if residual is None else x + residual
    shape = weight.shape
    if total.dtype == weight.dtype and total.dtype.itemsize == 4:
        normed = F.rms_norm(total, shape, weight, eps)
    else:
        normed = F.rms_norm(total.float(), shape, None, eps).to(total.dtype) * weight
    return normed if residual is None else (normed, total)


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm` as one Triton kernel: each element is read once and written once."""
    return norm_rows(_rms_norm_kernel, x, residual, (weight,), eps)


@jit
def _rms_norm_kernel(
    x,  # [rows, HIDDEN]
    residual,  # [rows, HIDDEN], read where FUSED
    weight,  # [HIDDEN]
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
    mask = (row < num_rows) & (column < HIDDEN)
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if FUSED:
        added = tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(total + row * HIDDEN + column, value, mask=mask)
    wide = value.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1) / HIDDEN
    normed = (wide * tl.rsqrt(mean_square + eps)[:, None]).to(value.dtype)
    scale = tl.load(weight + column, mask=column < HIDDEN, other=0.0)
    product = normed.to(tl.float32) * scale.to(tl.float32)
    tl.store(out + row * HIDDEN + column, product.to(value.dtype), mask=mask)
