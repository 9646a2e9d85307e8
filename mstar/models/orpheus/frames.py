"""Audio tokens <-> the codec's codes, and samples -> 16-bit PCM.

A frame is 7 tokens, each in a range of ids of its own (its slot), for three codebooks at rates
1 : 2 : 4. Token ids: 128266 + 4096 * slot + code.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["CODES", "FIRST_CODE", "SLOTS", "FrameBuffer", "by_level", "to_pcm16"]

FIRST_CODE = 128266  # token id of code 0 in slot 0
CODES = 4096  # per slot
SLOTS = ((0,), (1, 4), (2, 3, 5, 6))  # of each codebook, in order of time
_WIDTH = sum(map(len, SLOTS))


class FrameBuffer:
    """The frames of one utterance, grown token by token.

    A token counts only if it lies in the range of the slot that is due; any other (text, the stop
    token, a code for another slot) is dropped and the slot stays due.
    """

    def __init__(self) -> None:
        self.count = 0  # complete frames
        self._codes: list[int] = []

    def push(self, token: int) -> bool:
        """Take one token of the language model; True if it completed a frame."""
        slot = len(self._codes) - self.count * _WIDTH
        code = token - FIRST_CODE - CODES * slot
        if not 0 <= code < CODES:
            return False
        self._codes.append(code)
        if slot < _WIDTH - 1:
            return False
        self.count += 1
        return True

    def codes(self, lo: int, hi: int) -> list[int]:
        """The codes of frames lo to hi - 1, 7 of each, in the order of their tokens.

        Raises:
            IndexError: some of these frames are not there (yet).
        """
        if not 0 <= lo <= hi <= self.count:
            raise IndexError(f"frames {lo} to {hi} of {self.count}")
        return self._codes[lo * _WIDTH : hi * _WIDTH]


def by_level(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[..., frames * 7]` in the order of their tokens -> those of each codebook:
    `[..., frames]`, `[..., frames * 2]` and `[..., frames * 4]`."""
    frames = codes.unflatten(-1, (codes.shape[-1] // _WIDTH, _WIDTH))
    first, second, third = (frames[..., slots].flatten(-2) for slots in SLOTS)
    return first, second, third


def to_pcm16(wave: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] -> int16 of the same shape: clamped, times 32767, towards zero."""
    return (np.clip(wave, -1.0, 1.0) * np.float32(32767)).astype(np.int16)
