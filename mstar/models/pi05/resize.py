"""The two published ways to fit a camera's image into the square that the model sees.

Both keep its shape, centre it and pad it with black. lerobot samples it bilinearly as it is; the
server of openpi uses Pillow, which filters first where an image shrinks.

On a CPU lerobot's rule touches only the pixels that it needs, in buffers that are kept, and never
waits for torch's threads, which may be busy elsewhere.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

__all__ = ["RULES", "fit_lerobot", "fit_openpi", "fitted", "sampled"]

RULES = ("lerobot", "openpi")
_KEPT = 1 << 20  # numbers in a buffer: those of larger images are not kept


def fitted(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """Height and width that an image gets, and the rows and columns of padding before it."""
    ratio = max(size[1] / target[1], size[0] / target[0])
    height, width = (max(1, int(side / ratio)) for side in size)
    return height, width, (target[0] - height) // 2, (target[1] - width) // 2


def sampled(image: Tensor, target: tuple[int, int]) -> Tensor:
    """lerobot's rule as it is published, on any device: float32 `[3, *target]`, -1 to 1, of
    `[3, height, width]`, bytes or floats from 0 to 1."""
    x = image.float().div_(255) if image.dtype == torch.uint8 else image.float()
    if x.shape[1:] == target:
        return x * 2 - 1
    height, width, top, left = fitted(tuple(x.shape[1:]), target)
    x = F.interpolate(x.unsqueeze(0), (height, width), mode="bilinear", align_corners=False)[0]
    out = x.new_full((3, *target), -1.0)
    out[:, top : top + height, left : left + width] = x.clamp_(0, 1).mul_(2).sub_(1)
    return out


def fit_lerobot(image: np.ndarray, out: np.ndarray) -> None:
    """What `sampled` makes of bytes or float32 `[3, height, width]`, in `out`, within 1e-6."""
    size = image.shape[1:]
    if size == out.shape[1:]:
        return _scaled(image, out)
    rows = image.transpose(1, 2, 0)  # as cameras give them: colours last
    last = rows.flags.c_contiguous
    planes = rows.reshape(1, size[0], -1) if last else np.ascontiguousarray(image)
    _bilinear(size, out.shape[1:], last)(planes, out)


def fit_openpi(image: np.ndarray, out: np.ndarray) -> None:
    """Float32 `[3, *target]`, -1 to 1, in `out`, of bytes or float32 `[3, height, width]`."""
    if image.dtype != np.uint8:
        image = (image * np.float32(255)).astype(np.uint8)
    if image.shape[1:] == out.shape[1:]:
        return _scaled(image, out)
    height, width, top, left = fitted(image.shape[1:], out.shape[1:])
    pixels = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    small = np.asarray(pixels.resize((width, height), Image.Resampling.BILINEAR))
    _pad(out, height, width, top, left)
    _scaled(small.transpose(2, 0, 1), out[:, top : top + height, left : left + width])


class _Bilinear:
    """Samples images of one size. Any thread may use it.

    Args:
        size, target: of images before and after, padding included.
        last: whether colours come last.
    """

    def __init__(self, size: tuple[int, int], target: tuple[int, int], last: bool) -> None:
        self._place = height, width, _, _ = fitted(size, target)
        self._form = planes, colours = (1, 3) if last else (3, 1)
        *self._rows, down = _neighbours(size[0], height)
        *columns, across = _neighbours(size[1], width)
        self._down, self._across = down[:, None], np.tile(across, colours)
        offsets = np.arange(colours)[:, None]
        self._columns = [torch.from_numpy((x * colours + offsets).reshape(-1)) for x in columns]
        self._shapes = (planes, height, size[1] * colours), (planes * height, colours * width)
        self._free: list[tuple[np.ndarray, ...]] = []  # as many as were ever used at once

    def __call__(self, image: np.ndarray, out: np.ndarray) -> None:
        """Of bytes or float32 `[planes, height, width * colours]` to float32 `[3, *target]`."""
        try:
            buffers = self._free.pop()
        except IndexError:
            buffers = self._buffers()
        raw, upper, lower, before, after = buffers
        most = np.float32(255 if image.dtype == np.uint8 else 1)
        for rows, found in zip(self._rows, (upper, lower), strict=True):
            if image.dtype == np.uint8:
                np.copyto(found, np.take(image, rows, 1, out=raw, mode="clip"))
            else:
                np.take(image, rows, 1, out=found, mode="clip")
        _blend(upper, lower, self._down)
        lines = torch.from_numpy(upper).flatten(0, 1)
        for columns, found in zip(self._columns, (before, after), strict=True):
            torch.index_select(lines, 1, columns, out=torch.from_numpy(found))
        _blend(before, after, self._across)
        np.minimum(before, most, out=before)
        height, width, top, left = self._place
        _pad(out, *self._place)
        inside = out.reshape(*self._form, *out.shape[1:])
        inside = inside[:, :, top : top + height, left : left + width].swapaxes(1, 2)
        np.multiply(before, 2 / most, out=before)
        np.subtract(before.reshape(inside.shape), np.float32(1), out=inside)
        if upper.size <= _KEPT:
            self._free.append(buffers)

    def _buffers(self) -> tuple[np.ndarray, ...]:
        lines, small = self._shapes
        floats = (np.empty(shape, np.float32) for shape in (lines, lines, small, small))
        return np.empty(lines, np.uint8), *floats


_bilinear = lru_cache(8)(_Bilinear)


def _neighbours(count: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two old places that each new one lies between, and how much the second one counts; half
    pixels, in float32 with one rounding, as torch has it."""
    scale = np.float64(np.float32(count) / np.float32(wanted))
    places = ((np.arange(wanted) + 0.5) * scale - 0.5).astype(np.float32).clip(0, count - 1)
    first = places.astype(np.int64)
    return first, np.minimum(first + 1, count - 1), places - first.astype(np.float32)


def _blend(one: np.ndarray, other: np.ndarray, share: np.ndarray) -> None:
    """`one + share * (other - one)`, in `one`; `other` is lost."""
    np.subtract(other, one, out=other)
    np.multiply(other, share, out=other)
    np.add(one, other, out=one)


def _scaled(image: np.ndarray, out: np.ndarray) -> None:
    """Bytes, or floats from 0 to 1, as floats from -1 to 1."""
    np.copyto(out, image)
    np.multiply(out, np.float32(2 / 255 if image.dtype == np.uint8 else 2), out=out)
    np.subtract(out, np.float32(1), out=out)


def _pad(out: np.ndarray, height: int, width: int, top: int, left: int) -> None:
    """Black around where the image goes."""
    out[:, :top] = out[:, top + height :] = -1
    out[:, :, :left] = out[:, :, left + width :] = -1
