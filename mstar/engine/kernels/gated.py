"""Gated activations of a transformer's MLP: ``act(gate) * up`` in one pass.

SwiGLU and GEGLU of Shazeer 2020, "GLU variants improve transformer", equation 6. The activation is
computed in float32 and rounded to the input's dtype before the product, as separate torch ops do.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, tl, triton, use_triton

__all__ = ["gated_torch", "gated_triton", "gelu_tanh_mul", "silu_mul"]

_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``: ``gate_up`` ``[..., 2F]``, the gate first, to ``[..., F]``."""
    return (gated_triton if use_triton(gate_up) else gated_torch)(gate_up, "silu")


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the tanh form of gelu: ``[..., 2F]`` to ``[..., F]``."""
    return (gated_triton if use_triton(gate_up) else gated_torch)(gate_up, "gelu_tanh")


def gated_torch(gate_up: Tensor, activation: str) -> Tensor:
    """Either activation (``"silu"`` or ``"gelu_tanh"``) in plain torch."""
    half = gate_up.shape[-1] // 2
    gate, up = gate_up.split_with_sizes((half, half), -1)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return active.mul_(up)


def gated_triton(gate_up: Tensor, activation: str) -> Tensor:
    """Either activation as one Triton kernel."""
    width = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = rows.new_empty(len(rows), width)
    if out.numel():
        _gated_kernel[(len(rows), triton.cdiv(width, _BLOCK))](
            rows, out, width, rows.stride(0), SILU=activation == "silu", BLOCK=_BLOCK, num_warps=4
        )
    return out.view(*gate_up.shape[:-1], width)


@jit
def _gated_kernel(
    gate_up,  # [rows, 2 * width]
    out,  # [rows, width], contiguous
    width,
    row_stride,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * row_stride + column, mask=mask, other=0.0)
    up = tl.load(gate_up + row * row_stride + width + column, mask=mask, other=0.0)
    x = gate.to(tl.float32)
    if SILU:
        active = x * tl.sigmoid(x)
    else:
        # Hendrycks & Gimpel 2016, section 2: 0.5 x (1 + tanh(z)), and 1 + tanh(z) = 2 sigmoid(2z).
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        active = x * tl.sigmoid(2.0 * z)
    product = active.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * width + column, product.to(gate.dtype), mask=mask)
