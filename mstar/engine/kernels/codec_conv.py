"""A convolution of a codec with what surrounds it: residual addition before, activation after.

    y = conv(x) + bias + residual        a = snake(y)

as one matrix product over channels and taps, whose rows are gathered, and for transposed
convolutions also over the `rate` samples that one step becomes. In float32 on a GPU, products are
made of three in TF32 (Ootomo & Yokota, arXiv 2203.03341), which keep float32's precision: plain
TF32 is audible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.engine.kernels import tuning
from mstar.engine.kernels.dispatch import jit, tl, triton, use_triton
from mstar.engine.kernels.snake import snake_torch

__all__ = ["Activation", "codec_conv", "codec_conv_torch", "codec_conv_triton", "convolved"]

Activation = tuple[Tensor, Tensor]  # alpha and 1 / beta of `snake`, each [channels]

_NAME = "codec_conv"
_VARYING = ("x", "steps", "span", "first", "step", "x_batch_stride", "x_channel_stride")
# Larger ones do not fit into the registers of sm_80 and sm_90 (as ptxas says).
_TILES = [
    {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 64, "BLOCK_M": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_N": 32, "BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
]


def codec_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dilation: int = 1,
    rate: int = 0,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A causal convolution, or a transposed one; its sum, and the activation of that.

    Args:
        x: `[batch, inputs, steps]`.
        weight: `[channels, inputs, taps]`, the last tap at the step itself and the others
            `dilation` apart before it; of a transposed one `[inputs, channels, taps]`.
        bias: `[channels]`.
        rate: of a transposed one, the samples that a step becomes. It has as many taps, or twice as
            many: then the first and the last `rate` samples, of one step only, are left out.
        residual: like the result.

    Returns:
        `[batch, channels, steps or samples]`, and the activation where one is given.
    """
    compute = codec_conv_triton if use_triton(x) else codec_conv_torch
    return compute(
        x, weight, bias, dilation=dilation, rate=rate, residual=residual, activation=activation
    )


def codec_conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dilation: int = 1,
    rate: int = 0,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`codec_conv` in plain torch."""
    taps = weight.shape[2]
    if rate:
        y = convolved(x, weight, bias, stride=rate, padding=taps - rate, transposed=True)
    else:
        x = torch.nn.functional.pad(x, ((taps - 1) * dilation, 0))
        y = convolved(x, weight, bias, dilation=dilation)
    if residual is not None:
        y = y.add_(residual)
    return y, None if activation is None else snake_torch(y, *activation, dim=1)


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """`F.conv1d` or `F.conv_transpose1d`, but never in TF32 on a GPU.

    The operator beneath takes the permission as an argument, so that no setting that others share
    has to be touched.
    """
    cudnn = torch.backends.cudnn
    flags = (cudnn.benchmark, cudnn.deterministic, cudnn.enabled, False)
    sizes = ((stride,), (padding,), (dilation,), transposed, (0,), groups)
    return torch.ops.aten._convolution(x, weight, bias, *sizes, *flags)


def codec_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dilation: int = 1,
    rate: int = 0,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    tile: tuning.Choice | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`codec_conv` as one Triton kernel.

    Args:
        tile: one of `_TILES`; the fastest, if left out.
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    weight = weight.contiguous()
    batch, inputs, steps = x.shape
    channels, width = len(bias), weight.shape[2]
    if rate:
        taps, span = width // rate, steps - width // rate + 1
        first, step = 0, 1
        # Tap 0 of a sample is the earlier step, in the second half of the weights.
        layout = (width, channels * width, -rate, (taps - 1) * rate)
    else:
        taps, span = width, steps
        first, step = -(taps - 1) * dilation, dilation
        layout = (inputs * taps, taps, 1, 0)
    samples = max(rate, 1)
    out = x.new_empty(batch, channels, span * samples)
    active = out if activation is None else torch.empty_like(out)
    added = out if residual is None else residual.contiguous()
    alpha, inverse = (bias, bias) if activation is None else activation

    def launch(tile: tuning.Choice) -> None:
        _codec_conv_kernel[
            (
                triton.cdiv(span, tile["BLOCK_M"]),
                triton.cdiv(channels * samples, tile["BLOCK_N"]),
                batch,
            )
        ](
            x,
            weight,
            bias,
            added,
            alpha,
            inverse,
            out,
            active,
            inputs,
            channels,
            steps,
            span,
            first,
            step,
            x.stride(0),
            x.stride(1),
            *layout,
            TAPS=taps,
            RATE=samples,
            ADDED=residual is not None,
            ACTIVE=activation is not None,
            **tile,
        )

    if out.numel():
        if tile is None:
            shape = f"{inputs}x{taps} to {channels}x{samples}"
            tile = tuning.best(_NAME, shape, _TILES, launch, x.device)
        launch(tile)
    return out, None if activation is None else active


@jit(varying=_VARYING)
def _codec_conv_kernel(
    x,  # [batch, inputs, steps]
    weight,
    bias,  # [channels]
    added,  # [batch, channels, span * RATE], contiguous, read where ADDED
    alpha,  # [channels], read where ACTIVE
    inverse,
    out,  # like added
    active,  # like added, written where ACTIVE
    inputs,
    channels,
    steps,
    span,  # steps of the output
    first,  # the step that tap 0 of step 0 sees
    step,  # from one tap to the next
    x_batch_stride,
    x_channel_stride,
    channel_stride,  # of the weight; its samples are 1 apart
    input_stride,
    tap_stride,
    base,
    TAPS: tl.constexpr,
    RATE: tl.constexpr,
    ADDED: tl.constexpr,
    ACTIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_N (channel, sample) pairs of BLOCK_M steps of a clip."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    clip = tl.program_id(2).to(tl.int64)
    channel, sample = pair // RATE, pair % RATE
    is_channel = channel < channels
    rows = weight + base + channel * channel_stride + sample
    source = x + clip * x_batch_stride
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, inputs * TAPS, BLOCK_K):
        term = start + tl.arange(0, BLOCK_K)
        of, tap = term // TAPS, term % TAPS
        is_term = term < inputs * TAPS
        own = tl.load(
            rows[:, None] + (of * input_stride + tap * tap_stride)[None, :],
            mask=is_channel[:, None] & is_term[None, :],
            other=0.0,
        )
        seen = place[None, :] + (first + tap * step)[:, None]
        value = tl.load(
            source + (of * x_channel_stride)[:, None] + seen,
            mask=is_term[:, None] & (seen >= 0) & (seen < steps),
            other=0.0,
        )
        total = tl.dot(own, value, total, input_precision="tf32x3")
    total += tl.load(bias + channel, mask=is_channel, other=0.0)[:, None]
    target = (clip * channels + channel[:, None]) * span * RATE + place[None, :] * RATE
    target += sample[:, None]
    mask = is_channel[:, None] & (place < span)[None, :]
    if ADDED:
        total += tl.load(added + target, mask=mask, other=0.0)
    tl.store(out + target, total, mask=mask)
    if ACTIVE:
        a = tl.load(alpha + channel, mask=is_channel, other=0.0)[:, None]
        b = tl.load(inverse + channel, mask=is_channel, other=0.0)[:, None]
        wave = tl.sin(total * a)
        tl.store(active + target, total + wave * wave * b, mask=mask)
