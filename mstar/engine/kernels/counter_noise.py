"""Random numbers that are computed, not generated: a function of who asks for them.

The noise of one draw is an exponential variable for every token id: a hash of (seed, number of the
draw, id), the same in numpy and in torch, whatever else is drawn and in whatever order. The hash
is SplitMix64 (Steele, Lea and Flood 2014, section 3): `key(seed, n)` starts a stream of its own for
each draw, and token `i` has number `i` of that stream. (Its last step, which leaves the upper 31
bits as they are, is left out for the tokens: it costs as much as the others.)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, tl

__all__ = ["exponential", "key", "mix", "remainders", "signed", "uniform", "uniform_batch"]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_ONE = 0x3FF0000000000000  # the bits of 1.0; the 52 below are the fraction of a number in [1, 2)
_BELOW_ONE = 1.0 - 2.0**-53


def mix(value: int) -> int:
    """The 64-bit finaliser of SplitMix64: a bijection that scatters its input."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def key(seed: int, counter: int) -> int:
    """What draw number `counter` of the sequence with this seed is keyed with, in 0 .. 2^64 - 1."""
    return mix(mix(seed) + _GAMMA * (counter + 1))


def signed(value: int) -> int:
    """The int64 with the same bits: sums and products of both kinds agree modulo 2^64."""
    return value - (1 << 64) if value >> 63 else value


def uniform(key: int, ids: np.ndarray, out: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Numbers in (0, 1), one for each token id of one draw.

    Args:
        ids: int64 `[n]`.
        out: float64 `[n]`; it is overwritten and returned.
        spare: uint64 `[n]`; it is overwritten.

    Returns:
        Odd multiples of 2^-53.
    """
    value, shifted = out.view(np.uint64), spare
    np.multiply(ids.view(np.uint64), np.uint64(_GAMMA), out=value)
    value += np.uint64((key + _GAMMA) & _MASK)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        np.right_shift(value, np.uint64(shift), out=shifted)
        value ^= shifted
        value *= np.uint64(factor)
    value >>= np.uint64(12)
    value |= np.uint64(_ONE)
    out -= _BELOW_ONE
    return out


def uniform_batch(keys: Tensor, ids: Tensor) -> Tensor:
    """As `uniform`, to the bit, for the rows of a batch.

    Args:
        keys: int64 `[batch, 1]`, modulo 2^64.
        ids: int64 `[vocab]` or `[batch, vocab]`.

    Returns:
        float64 `[batch, vocab]`.
    """
    value = ids * signed(_GAMMA) + (keys + signed(_GAMMA))
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        value ^= _right(value, shift)
        value *= signed(factor)
    return _right(value, 12).bitwise_or_(_ONE).view(torch.float64).sub_(_BELOW_ONE)


def exponential(uniform: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Exponential variables of mean 1 from numbers in (0, 1). Each is greater than its number."""
    return -(torch if isinstance(uniform, Tensor) else np).log1p(-uniform)


@jit
def remainders(key, ids):
    """1 minus what `uniform` gives, to the bit, in a Triton kernel; minus its logarithm is what
    `exponential` gives.

    Args:
        key: a uint64.
        ids: int32 of any shape; the result, float64, has the same.
    """
    value = ids.to(tl.uint64) * 0x9E3779B97F4A7C15 + (key + 0x9E3779B97F4A7C15)
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    above_one = ((value >> 12) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    return (2.0 - above_one) - 1.1102230246251565e-16  # 2^-53; nothing is rounded


def _right(value: Tensor, shift: int) -> Tensor:
    """The bits of an int64 shifted right, zeros coming in (torch would repeat the sign)."""
    return (value >> shift).bitwise_and_((1 << (64 - shift)) - 1)
