"""The codec's noise, as a function of a seed and of the position in the utterance.

Windows that overlap see the same noise where they overlap, so how an utterance is cut into
windows cannot be heard.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["frame_noise", "window_noise"]

_MASK = (1 << 64) - 1


def frame_noise(seed: int, frame: int, lengths_per_frame: Sequence[int]) -> list[Tensor]:
    """Standard normal noise of one frame for every block of the decoder.

    Args:
        seed: any integer.
        frame: its number in the utterance, from 0.
        lengths_per_frame: time steps of each block in one frame.

    Returns:
        float32 [length] on the CPU for each block.
    """
    generator = torch.Generator().manual_seed(_mix(seed, frame))
    return list(torch.randn(sum(lengths_per_frame), generator=generator).split(lengths_per_frame))


def window_noise(seed: int, lo: int, hi: int, lengths_per_frame: Sequence[int]) -> list[Tensor]:
    """The noise of frames lo to hi - 1: float32 [1, 1, (hi - lo) * length] for each block."""
    frames = [frame_noise(seed, frame, lengths_per_frame) for frame in range(lo, hi)]
    return [torch.cat(block).view(1, 1, -1) for block in zip(*frames, strict=True)]


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
