"""What the norm kernels share: the rows of a tensor, with or without a residual."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mstar.engine.kernels.dispatch import next_power_of_2, triton

__all__ = ["norm_rows"]


def norm_rows(
    kernel: Any, x: Tensor, residual: Tensor | None, weights: tuple[Tensor, ...], eps: float
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a norm kernel over the last dimension of `x`, or of `x + residual`.

    Args:
        kernel: takes rows, residual, the weights, outputs, sums, their number, `eps`, and strides.

    Returns:
        The normed tensor; with `residual`, `(normed, x + residual)`.
    """
    hidden = x.shape[-1]
    rows = x.reshape(-1, hidden)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    fused = residual is not None
    other = residual.reshape(-1, hidden) if fused else rows
    other = other if other.stride(1) == 1 else other.contiguous()
    out = rows.new_empty(rows.shape)
    total = rows.new_empty(rows.shape) if fused else out
    block = next_power_of_2(hidden)
    rows_per_program = max(1, 1024 // block)  # head norms have short rows
    if len(rows):
        kernel[(triton.cdiv(len(rows), rows_per_program),)](
            rows,
            other,
            *weights,
            out,
            total,
            len(rows),
            eps,
            rows.stride(0),
            other.stride(0),
            HIDDEN=hidden,
            BLOCK=block,
            ROWS=rows_per_program,
            FUSED=fused,
            num_warps=min(16, max(2, block // 512)),
        )
    normed = out.view(x.shape)
    return (normed, total.view(x.shape)) if fused else normed
