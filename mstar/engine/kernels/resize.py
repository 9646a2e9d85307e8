"""Images of bytes to another size, as Pillow or as torch does it, to the bit; and normalised.

Both average over a window with a filter that is as wide as the image shrinks, along rows and then
along columns, with weights in fixed point and bytes in between. Pillow's weights have 22 fractional
bits, torch's (`interpolate` of bytes with `antialias=True`) as many as fit 16 in all. The bicubic
filter is that of Keys 1981 with a = -0.5. (From version 13 on Pillow takes the columns first where
that is less work, and is then off by one level in places.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, tl, triton, use_triton

__all__ = ["Normal", "resize", "resize_torch", "resize_triton", "resized_on"]

Filter = Literal["bilinear", "bicubic"]
Rounding = Literal["pillow", "torch"]
_BLOCK = 1024
_PILLOW_BITS, _SHORT = 22, 1 << 15


@dataclass(frozen=True)
class Normal:
    """What bytes become: `(x / 255 - mean) / std`, the colours before rows and columns.

    Args:
        mean, std: of the three colours, of values from 0 to 1.
        dtype: of the result; it is computed in float32.
    """

    mean: Sequence[float]
    std: Sequence[float]
    dtype: torch.dtype


def resize(
    images: Tensor,
    size: tuple[int, int],
    filter: Filter,
    rounding: Rounding = "pillow",
    normal: Normal | None = None,
) -> Tensor:
    """Bytes `[..., height, width, 3]` in another size; with `normal`, `[..., 3, height, width]`.

    Args:
        size: height and width of the result.
        rounding: whose last bits are wanted.
    """
    compute = resize_triton if use_triton(images) else resize_torch
    return compute(images, size, filter, rounding, normal)


def resize_torch(
    images: Tensor,
    size: tuple[int, int],
    filter: Filter,
    rounding: Rounding = "pillow",
    normal: Normal | None = None,
) -> Tensor:
    """`resize` in plain torch."""
    x = images
    for dim, wanted in ((-2, size[1]), (-3, size[0])):
        if x.shape[dim] == wanted:
            continue
        first, weights, bits = _taps(x.shape[dim], wanted, filter, rounding)
        places = torch.from_numpy(first[:, None] + np.arange(weights.shape[1]))
        places = places.clamp_(max=x.shape[dim] - 1).to(x.device)
        shape = [-1 if i == x.ndim + dim else 1 for i in range(x.ndim)]
        total = 1 << (bits - 1)
        for place, weight in zip(places.T, torch.from_numpy(weights).to(x.device).T, strict=True):
            total = total + x.index_select(dim, place).int() * weight.view(shape)
        x = (total >> bits).clamp_(0, 255).to(torch.uint8)
    if normal is None:
        return x.clone() if x is images else x
    y = x.movedim(-1, -3).float().div_(255)
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (normal.mean, normal.std))
    return y.sub_(mean).div_(std).to(normal.dtype).contiguous()


def resize_triton(
    images: Tensor,
    size: tuple[int, int],
    filter: Filter,
    rounding: Rounding = "pillow",
    normal: Normal | None = None,
) -> Tensor:
    """`resize` as one Triton kernel, run along rows and then along columns."""
    *batch, height, width, colours = images.shape
    count = images.numel() // max(1, height * width * colours)
    x = images.contiguous()
    if width != size[1]:
        x = _pass(x, count * height, width, size[1], colours, filter, rounding, None)
    if height != size[0] or normal is not None:
        x = _pass(x, count, height, size[0], size[1] * colours, filter, rounding, normal)
    shape = (*size, colours) if normal is None else (colours, *size)
    return x.clone() if x is images else x.view(*batch, *shape)


def resized_on(
    device: torch.device,
    image: np.ndarray,
    size: tuple[int, int],
    filter: Filter,
    rounding: Rounding = "pillow",
) -> np.ndarray:
    """`resize` on a GPU of bytes that are on the host and are wanted there.

    It has a stream of its own, so that it neither waits for what runs there nor holds it up.
    """
    with torch.cuda.stream(_stream(device)):
        host = torch.empty(image.shape, dtype=torch.uint8, pin_memory=True)
        host.numpy()[...] = image
        x = host.to(device, non_blocking=True)
        return resize(x, size, filter, rounding).cpu().numpy()


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _pass(
    x: Tensor,
    outer: int,
    length: int,
    wanted: int,
    inner: int,
    filter: Filter,
    rounding: Rounding,
    normal: Normal | None,
) -> Tensor:
    """Rows `[outer, length, inner]` to `[outer, wanted, inner]`, flat."""
    dtype = torch.uint8 if normal is None else normal.dtype
    out = torch.empty(outer * wanted * inner, dtype=dtype, device=x.device)
    means = (0.0,) * 3 if normal is None else normal.mean
    stds = (1.0,) * 3 if normal is None else normal.std
    if out.numel():
        _resize_kernel[(outer, triton.cdiv(wanted * inner, _BLOCK))](
            x,
            _table(length, wanted, inner, filter, rounding, x.device),
            out,
            *(float(value) for pair in zip(means, stds, strict=True) for value in pair),
            NORMAL=normal is not None,
            BLOCK=_BLOCK,
        )
    return out


@lru_cache(maxsize=64)
def _table(
    length: int, wanted: int, inner: int, filter: Filter, rounding: Rounding, device: torch.device
) -> Tensor:
    """What the kernel has to know, in memory, so that it is not compiled for the numbers."""
    first, weights, bits = _taps(length, wanted, filter, rounding)
    sizes = np.array([length, wanted, inner, weights.shape[1], bits], dtype=np.int32)
    table = torch.from_numpy(np.concatenate([sizes, first, weights.T.ravel()])).to(device)
    if table.is_cuda:
        torch.cuda.current_stream(device).synchronize()  # other streams will read it
    return table


@lru_cache(maxsize=64)
def _taps(
    length: int, wanted: int, filter: Filter, rounding: Rounding
) -> tuple[np.ndarray, np.ndarray, int]:
    """For each of the wanted places the first one it sees, int32 `[wanted]`, the weights of that
    and those after it, int32 `[wanted, taps]`, and their fractional bits."""
    scale = length / wanted
    stretch = max(scale, 1.0)
    support = stretch * (1.0 if filter == "bilinear" else 2.0)
    centre = (np.arange(wanted) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), length)
    place = first[:, None] + np.arange(max(1, int((last - first).max(initial=1))))
    away = np.abs((place - centre[:, None] + 0.5) / stretch)
    weights = _hat(away) if filter == "bilinear" else _keys(away)
    weights[place >= last[:, None]] = 0
    weights /= weights.cumsum(1)[:, -1:]
    bits = _PILLOW_BITS
    if rounding == "torch":
        largest = max(weights.max(initial=0), 0)
        bits = next(
            b for b in range(_PILLOW_BITS + 1) if int(0.5 + largest * 2 ** (b + 1)) >= _SHORT
        )
    fixed = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights)).astype(np.int32)
    return first.astype(np.int32), fixed, bits


def _hat(away: np.ndarray) -> np.ndarray:
    return np.maximum(1 - away, 0)


def _keys(away: np.ndarray) -> np.ndarray:
    near = (1.5 * away - 2.5) * away * away + 1
    far = ((-0.5 * away + 2.5) * away - 4) * away + 2
    return np.where(away < 1, near, np.where(away < 2, far, 0.0))


@jit
def _resize_kernel(
    x,  # [outer, length, inner]
    table,  # length, wanted, inner, taps, bits; the first tap of each place; [taps, wanted] weights
    out,  # [outer, wanted, inner]; where NORMAL, [outer, 3, wanted, inner / 3]
    red_mean,
    red_std,
    green_mean,
    green_std,
    blue_mean,
    blue_std,
    NORMAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one of the outer parts."""
    length, wanted, inner = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    taps, bits = tl.load(table + 3), tl.load(table + 4)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < wanted * inner
    place, rest = element // inner, element % inner
    part = tl.program_id(0).to(tl.int64)
    source = x + part * length * inner + rest
    first = tl.load(table + 5 + place, mask=mask, other=0)
    weights = table + 5 + wanted + place
    total = tl.zeros([BLOCK], tl.int32) + (1 << (bits - 1))
    for tap in range(taps):
        weight = tl.load(weights + tap * wanted, mask=mask, other=0)
        at = first + tap
        value = tl.load(source + at * inner, mask=mask & (at < length), other=0)
        total += value.to(tl.int32) * weight
    level = tl.minimum(tl.maximum(total >> bits, 0), 255)
    target = out + part * wanted * inner
    if NORMAL:
        colour = rest % 3
        mean = tl.where(colour == 0, red_mean, tl.where(colour == 1, green_mean, blue_mean))
        std = tl.where(colour == 0, red_std, tl.where(colour == 1, green_std, blue_std))
        result = (level.to(tl.float32) / 255.0 - mean) / std
        planar = (colour * wanted + place) * (inner // 3) + rest // 3
        tl.store(target + planar, result.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(target + element, level.to(tl.uint8), mask=mask)
