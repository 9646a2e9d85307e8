"""Rotary positions that combine a head's channels in neighbouring pairs, by tables:

    out[j] = x[j] * own[j] + x[j ^ 1] * other[j]

The two of a pair have entries of their own, so they may turn by different angles, as V-JEPA 2's do.
Everything is float32 up to the one rounding at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, triton, use_triton

__all__ = ["pair_rotary", "pair_rotary_torch", "pair_rotary_triton"]


def pair_rotary(x: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Turned heads, contiguous.

    Args:
        x: `[batch, tokens, ..., head_dim]`.
        own, other: float32 `[tokens, head_dim]`, or `[batch, tokens, head_dim]`; a last channel
            without a neighbour is left out of them, and stays as it is.
    """
    return (pair_rotary_triton if use_triton(x) else pair_rotary_torch)(x, own, other)


def pair_rotary_torch(x: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """`pair_rotary` in plain torch."""
    even = own.shape[-1]
    shape = *own.shape[:-1], *(1 for _ in x.shape[2:-1]), even
    pairs = x[..., :even].float()
    swapped = torch.stack([pairs[..., 1::2], pairs[..., 0::2]], -1).flatten(-2)
    out = torch.addcmul(pairs * own.view(shape), swapped, other.view(shape)).to(x.dtype)
    return out if even == x.shape[-1] else torch.cat([out, x[..., even:]], -1)


def pair_rotary_triton(x: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """`pair_rotary` as one Triton kernel: each element is read and written once."""
    batch, tokens, *_, dim = x.shape
    heads = x.flatten(2, -2)
    heads = heads if heads.stride(-1) == 1 else heads.contiguous()
    out = x.new_empty(x.shape)
    own, other = own.contiguous(), other.contiguous()
    block_d = next_power_of_2(dim)
    block_h = max(1, min(2048 // block_d, next_power_of_2(heads.shape[2])))
    if out.numel():
        _pair_rotary_kernel[(batch * tokens, triton.cdiv(heads.shape[2], block_h))](
            heads,
            own,
            other,
            out,
            tokens,
            heads.shape[2],
            own.shape[-1],
            0 if own.ndim == 2 else tokens,
            heads.stride(0),
            heads.stride(1),
            heads.stride(2),
            DIM=dim,
            BLOCK_D=block_d,
            BLOCK_H=block_h,
            num_warps=4,
        )
    return out


@jit(varying=("tokens", "table_rows"))
def _pair_rotary_kernel(
    x,  # [batch, tokens, heads, DIM]
    own,  # [batch or 1, tokens, even]
    other,  # like own
    out,  # like x, contiguous
    tokens,
    heads,
    even,
    table_rows,  # of each batch: 0 where they share a table
    batch_stride,
    token_stride,
    head_stride,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: BLOCK_H heads of one token."""
    row = tl.program_id(0).to(tl.int64)
    item, token = row // tokens, row % tokens
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < heads) & (channel < DIM)
    turned = channel < even
    begin = x + item * batch_stride + token * token_stride + head * head_stride
    value = tl.load(begin + channel, mask=mask, other=0.0)
    beside = tl.load(begin + (channel ^ 1), mask=mask & turned, other=0.0)
    entry = (item * table_rows + token) * even + channel
    first = tl.load(own + entry, mask=turned, other=1.0)
    second = tl.load(other + entry, mask=turned, other=0.0)
    result = value.to(tl.float32) * first + beside.to(tl.float32) * second
    tl.store(out + (row * heads + head) * DIM + channel, result.to(value.dtype), mask=mask)
