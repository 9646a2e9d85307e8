"""Root-mean-square norm, alone or fused with the residual addition before it.

    rms_norm(x) = cast(x / sqrt(mean(x^2) + eps)) * weight

(Zhang & Sennrich 2019, equation 4.) Statistics are float32; the quotient is rounded to the dtype of
``x`` before it meets the weight, the convention of Llama's published code.
"""

from __future__ import annotations

from functools import lru_cache
from typing import overload

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, tl, use_triton
from mstar.engine.kernels.norm_rows import norm_rows

__all__ = ["rms_norm", "rms_norm_torch", "rms_norm_triton", "unit_rms"]


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
    if total.dtype == weight.dtype and total.dtype.itemsize == 4:
        normed = unit_rms(total, eps).mul_(weight)
    else:
        normed = unit_rms(total.float(), eps).to(total.dtype) * weight
    return normed if residual is None else (normed, total)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last dimension, in plain torch.

    On a CPU it takes 5 us for a row, and torch's own `rms_norm`, seven operations, 8.
    """
    scale, root = _constants(x.shape[-1], eps, x.dtype)
    return x / torch.linalg.vector_norm(x, 2, -1, True).mul_(scale).hypot_(root)


@lru_cache(maxsize=256)
def _constants(width: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """1 / sqrt(width) and sqrt(eps) as tensors: operations take those faster than numbers."""
    with torch.inference_mode(False):
        return torch.tensor(width**-0.5, dtype=dtype), torch.tensor(eps**0.5, dtype=dtype)


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm` as one Triton kernel: each element is read once and written once."""
    return norm_rows(_rms_norm_kernel, x, residual, (weight,), eps)


@jit(varying=("num_rows",))
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
