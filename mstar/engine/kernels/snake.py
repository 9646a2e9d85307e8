"""The activation of neural codecs, alone and after a depthwise convolution.

    snake(x) = x + sin(alpha x)^2 / beta

(Ziyin et al., arXiv 2006.08195, equation 3; with a beta of its own: Lee et al., arXiv 2206.04658,
section 3.1), with alpha and 1 / beta of every channel. All of it is float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, tl, triton, use_triton

__all__ = [
    "depthwise_snake",
    "depthwise_snake_torch",
    "depthwise_snake_triton",
    "snake",
    "snake_torch",
    "snake_triton",
]

_BLOCK = 1024
_STEPS, _CHANNELS = 16, 64
_VARYING = "inner", "steps", "dilation"


def snake(x: Tensor, alpha: Tensor, inverse: Tensor, dim: int = -1) -> Tensor:
    """The activation of `x`, whose dimension `dim` are the channels.

    Args:
        alpha, inverse: `[channels]`; the second is 1 / beta.
    """
    return (snake_triton if use_triton(x) else snake_torch)(x, alpha, inverse, dim)


def depthwise_snake(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int, alpha: Tensor, inverse: Tensor
) -> Tensor:
    """The activation of a depthwise convolution, with zeros beyond the ends.

    Args:
        x: `[batch, steps, channels]`.
        weight: `[channels, taps]`, an odd number of taps, `dilation` apart.
        bias, alpha, inverse: `[channels]`.
    """
    compute = depthwise_snake_triton if use_triton(x) else depthwise_snake_torch
    return compute(x, weight, bias, dilation, alpha, inverse)


def snake_torch(x: Tensor, alpha: Tensor, inverse: Tensor, dim: int = -1) -> Tensor:
    """`snake` in plain torch."""
    shape = [-1 if i == dim % x.ndim else 1 for i in range(x.ndim)]
    wave = torch.mul(x, alpha.view(shape)).sin_().square_()
    return wave.mul_(inverse.view(shape)).add_(x)


def depthwise_snake_torch(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int, alpha: Tensor, inverse: Tensor
) -> Tensor:
    """`depthwise_snake` in plain torch."""
    channels, taps = weight.shape
    reach = taps // 2 * dilation
    kernel = weight.unsqueeze(1)
    y = F.conv1d(x.mT, kernel, bias, padding=reach, dilation=dilation, groups=channels)
    return snake_torch(y.mT, alpha, inverse)


def snake_triton(x: Tensor, alpha: Tensor, inverse: Tensor, dim: int = -1) -> Tensor:
    """`snake` as one Triton kernel."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _snake_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, alpha, inverse, out, x.numel(), x.shape[dim], x.stride(dim), BLOCK=_BLOCK
        )
    return out


def depthwise_snake_triton(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int, alpha: Tensor, inverse: Tensor
) -> Tensor:
    """`depthwise_snake` as one Triton kernel."""
    x = x.contiguous()
    batch, steps, channels = x.shape
    out = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(channels, _CHANNELS), triton.cdiv(steps, _STEPS), batch)
        _depthwise_snake_kernel[grid](
            x,
            weight,
            bias,
            alpha,
            inverse,
            out,
            steps,
            channels,
            dilation,
            TAPS=weight.shape[1],
            STEPS=_STEPS,
            CHANNELS=_CHANNELS,
        )
    return out


@jit(varying=_VARYING)
def _snake_kernel(
    x,  # contiguous, as is out
    alpha,  # [channels]
    inverse,
    out,
    size,
    channels,
    inner,  # elements of one channel in a row
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    channel = (place // inner) % channels
    value = tl.load(x + place, mask=mask, other=0.0)
    a = tl.load(alpha + channel, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(inverse + channel, mask=mask, other=0.0).to(tl.float32)
    wave = tl.sin(a * value.to(tl.float32))
    tl.store(out + place, (value.to(tl.float32) + wave * wave * b).to(value.dtype), mask=mask)


@jit(varying=_VARYING[1:])
def _depthwise_snake_kernel(
    x,  # [batch, steps, channels], contiguous, as is out
    weight,  # [channels, TAPS]
    bias,  # [channels]
    alpha,
    inverse,
    out,
    steps,
    channels,
    dilation,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program: STEPS steps of CHANNELS channels."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    step = (tl.program_id(1) * STEPS + tl.arange(0, STEPS))[:, None]
    is_channel = channel < channels
    clip = tl.program_id(2).to(tl.int64) * steps * channels
    start = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    total = tl.zeros([STEPS, CHANNELS], tl.float32) + start[None, :]
    for tap in tl.static_range(TAPS):
        source = step + (tap - TAPS // 2) * dilation
        mask = (source >= 0) & (source < steps) & is_channel[None, :]
        value = tl.load(x + clip + source * channels + channel[None, :], mask=mask, other=0.0)
        own = tl.load(weight + channel * TAPS + tap, mask=is_channel, other=0.0)
        total += value.to(tl.float32) * own.to(tl.float32)[None, :]
    a = tl.load(alpha + channel, mask=is_channel, other=0.0).to(tl.float32)
    b = tl.load(inverse + channel, mask=is_channel, other=0.0).to(tl.float32)
    wave = tl.sin(total * a[None, :])
    result = (total + wave * wave * b[None, :]).to(out.dtype.element_ty)
    target = out + clip + step * channels + channel[None, :]
    tl.store(target, result, mask=(step < steps) & is_channel[None, :])
