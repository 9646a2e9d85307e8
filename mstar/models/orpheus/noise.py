"""The codec's noise, as a function of a seed and of the position in the utterance.

Windows that overlap see the same noise where they overlap, so how an utterance is cut into
windows cannot be heard.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["FrameNoise", "by_block"]

_MASK = (1 << 64) - 1
_KEPT = 2048  # frames: 28 MB at the published size, as many as the windows of 290 streams hold


class FrameNoise:
    """Standard normal noise, made once for a frame that several windows in a row hold.

    Args:
        steps: time steps in one frame, of all blocks of the decoder together.
    """

    def __init__(self, steps: int) -> None:
        self._frame = lru_cache(_KEPT)(lambda seed, frame: _draw(seed, frame, steps))

    def window(self, seed: int, low: int, high: int) -> Tensor:
        """The noise of frames low to high - 1 of an utterance: float32 [frames, steps], CPU.

        Args:
            seed: any integer.
        """
        return torch.stack([self._frame(seed, frame) for frame in range(low, high)])


def by_block(noise: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """What `SnacDecoder` takes of noise [batch, frames, steps]: [batch, 1, frames * length] each.

    Args:
        lengths: time steps of each block in one frame, which add up to `steps`.
    """
    return [block.flatten(1).unsqueeze(1) for block in noise.split(list(lengths), 2)]


def _draw(seed: int, frame: int, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(_mix(seed, frame))
    return torch.randn(steps, generator=generator)


def _mix(seed: int, frame: int) -> int:
    """A 64-bit seed for one frame; the constants and shifts are splitmix64's (Steele et al. 2014).

    Neighbouring seeds and frames give unrelated results.
    """
    state = ((seed & _MASK) * 0x9E3779B97F4A7C15 + frame) & _MASK
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1  # manual_seed takes signed numbers
