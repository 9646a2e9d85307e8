"""Sound at another rate: band-limited interpolation (Smith & Gossett 1984)."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["resampled"]

_CROSSINGS = 16  # of zero, of the kernel on each side
_ROLL_OFF = 0.945  # share of the lower Nyquist frequency that passes
_BETA = 12.0  # of the Kaiser window
_LARGEST = 1000  # odd rates are taken for the nearest ratio of numbers up to this


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Mono sound float32 `[samples]` at `wanted` Hz, from one at `rate` Hz; of the same length in
    seconds, rounded up to a sample."""
    samples = np.ascontiguousarray(samples, dtype=np.float32)
    if rate == wanted or not len(samples):
        return samples
    ratio = Fraction(wanted, rate).limit_denominator(_LARGEST) or Fraction(1, _LARGEST)
    up, down = ratio.numerator, ratio.denominator
    kernels, reach = _kernels(up, down)
    count = math.ceil(len(samples) * wanted / rate)
    groups = math.ceil(count / up)
    needed = (groups - 1) * down + kernels.shape[2]
    x = F.pad(torch.from_numpy(samples), (reach, max(0, needed - len(samples) - reach)))
    y = F.conv1d(x[None, None], kernels, stride=down)
    return y[0].T.flatten()[:count].numpy()


@lru_cache(maxsize=16)
def _kernels(up: int, down: int) -> tuple[Tensor, int]:
    """A kernel `[up, 1, taps]` for each of `up` samples that come of `down`, and how far they reach
    to the left."""
    cutoff = _ROLL_OFF * min(1.0, up / down)
    reach = math.ceil(_CROSSINGS / cutoff)
    taps = np.arange(-reach, down + reach)
    away = taps - np.arange(up)[:, None] * (down / up)  # of the input, from each output
    inside = np.clip(1 - (away / reach) ** 2, 0, None)
    window = np.where(inside > 0, np.i0(_BETA * np.sqrt(inside)), 0) / np.i0(_BETA)
    kernels = cutoff * np.sinc(cutoff * away) * window
    return torch.from_numpy(kernels.astype(np.float32))[:, None], reach
