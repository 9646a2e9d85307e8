"""Bytes of images to what a vision network takes, in one pass: colours apart, and normalised.

y = (x / 255 - mean) / std
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, tl, triton, use_triton

__all__ = ["normalise_pixels", "normalise_pixels_torch", "normalise_pixels_triton"]

_BLOCK = 512


def normalise_pixels(
    frames: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Bytes `[..., height, width, 3]` to `[..., 3, height, width]`, computed in float32.

    Args:
        mean, std: of the three colours, of values from 0 to 1.
        dtype: of the result.
    """
    compute = normalise_pixels_triton if use_triton(frames) else normalise_pixels_torch
    return compute(frames, mean, std, dtype)


def normalise_pixels_torch(
    frames: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """`normalise_pixels` in plain torch."""
    x = frames.movedim(-1, -3).float().div_(255)
    middle, spread = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (mean, std))
    return x.sub_(middle).div_(spread).to(dtype).contiguous()


def normalise_pixels_triton(
    frames: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """`normalise_pixels` as one Triton kernel: three bytes of a pixel are read once."""
    frames = frames.contiguous()
    *batch, height, width, _ = frames.shape
    out = torch.empty(*batch, 3, height, width, dtype=dtype, device=frames.device)
    size = height * width
    if out.numel():
        grid = (triton.cdiv(size, _BLOCK), frames.numel() // (3 * size))
        _pixels_kernel[grid](
            frames,
            out,
            size,
            *(float(value) for pair in zip(mean, std, strict=True) for value in pair),
            BLOCK=_BLOCK,
        )
    return out


@jit
def _pixels_kernel(
    frames,  # [frames, size, 3]
    out,  # [frames, 3, size]
    size,
    red_mean,
    red_std,
    green_mean,
    green_std,
    blue_mean,
    blue_std,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK pixels of one frame."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < size
    frame = tl.program_id(1).to(tl.int64) * size * 3
    source, target = frames + frame + pixel * 3, out + frame + pixel
    dtype = out.dtype.element_ty
    red = tl.load(source, mask=mask, other=0).to(tl.float32) / 255.0
    green = tl.load(source + 1, mask=mask, other=0).to(tl.float32) / 255.0
    blue = tl.load(source + 2, mask=mask, other=0).to(tl.float32) / 255.0
    tl.store(target, ((red - red_mean) / red_std).to(dtype), mask=mask)
    tl.store(target + size, ((green - green_mean) / green_std).to(dtype), mask=mask)
    tl.store(target + 2 * size, ((blue - blue_mean) / blue_std).to(dtype), mask=mask)
