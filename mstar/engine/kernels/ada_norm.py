"""RMS norm whose scale and shift depend on the timestep, fused with the gated addition before it.

    total = x + gate * added,  normed = total / sqrt(mean(total^2) + eps) * scale + shift

(adaRMS: the RMS norm of Zhang & Sennrich 2019, modulated as in Peebles & Xie, arXiv 2212.09748,
section 3.2.) All of it is float32; only the results are rounded, `total` before it is normed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, use_triton
from mstar.engine.kernels.rms_norm import unit_rms

__all__ = ["ada_norm", "ada_norm_torch", "ada_norm_triton"]


def ada_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    added: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm of `x`, or of `x + gate * added`, over its last dimension.

    Args:
        x: `[batch, tokens, width]`.
        scale, shift: float32 `[batch or 1, tokens or 1, width]`.
        added: like `x`.
        gate: like `scale`.

    Returns:
        The normed tensor, and what was normed.
    """
    compute = ada_norm_triton if use_triton(x) else ada_norm_torch
    return compute(x, scale, shift, eps, added, gate)


def ada_norm_torch(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    added: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ada_norm` in plain torch."""
    total = x if added is None else torch.addcmul(x.float(), gate, added.float()).to(x.dtype)
    normed = unit_rms(total.float(), eps)
    return torch.addcmul(shift, normed, scale).to(x.dtype), total


def ada_norm_triton(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    added: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ada_norm` as one Triton kernel: each element is read once and written once."""
    tokens, width = x.shape[-2:]
    rows = x.reshape(-1, width).contiguous()
    fused = added is not None
    other = added.reshape(-1, width).contiguous() if fused else rows
    vectors = [v.expand(x.shape) for v in (scale, shift, gate if fused else shift)]
    vectors = [v if v.stride(-1) == 1 else v.contiguous() for v in vectors]
    out = torch.empty_like(rows)
    total = torch.empty_like(rows) if fused else rows
    if len(rows):
        block = next_power_of_2(width)
        _ada_norm_kernel[(len(rows),)](
            rows,
            other,
            *vectors,
            out,
            total,
            tokens,
            eps,
            *(stride for v in vectors for stride in v.stride()[:2]),
            WIDTH=width,
            BLOCK=block,
            FUSED=fused,
            num_warps=min(16, max(2, block // 512)),
        )
    return out.view(x.shape), total.view(x.shape)


@jit
def _ada_norm_kernel(
    x,  # [rows, WIDTH], contiguous, as are added, out and total
    added,  # read where FUSED
    scale,  # [batch, tokens, WIDTH], often with strides of 0
    shift,
    gate,  # read where FUSED
    out,
    total,  # written where FUSED
    tokens,
    eps,
    scale_batch,
    scale_token,
    shift_batch,
    shift_token,
    gate_batch,
    gate_token,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FUSED: tl.constexpr,
):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    place = row * WIDTH + column
    value = tl.load(x + place, mask=mask, other=0.0)
    if FUSED:
        factor = tl.load(gate + batch * gate_batch + token * gate_token + column, mask=mask)
        more = tl.load(added + place, mask=mask, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + factor * more).to(value.dtype)
        tl.store(total + place, value, mask=mask)
    wide = tl.where(mask, value.to(tl.float32), 0.0)
    mean_square = tl.sum(wide * wide, axis=0) / WIDTH
    normed = wide * tl.rsqrt(mean_square + eps)
    by = tl.load(scale + batch * scale_batch + token * scale_token + column, mask=mask)
    plus = tl.load(shift + batch * shift_batch + token * shift_token + column, mask=mask)
    tl.store(out + place, (normed * by + plus).to(value.dtype), mask=mask)
