"""Planning against the clock: how much can still be done."""

from __future__ import annotations

import time

import torch

__all__ = ["Budget"]


class Budget:
    """How many samples can still be scored.

    Args:
        deadline: of `time.monotonic`.
        first: samples of the first batch, from which the rest is reckoned.
    """

    def __init__(self, deadline: float, first: int) -> None:
        self.deadline, self.first = deadline, first
        self._began = 0.0
        self._each: float | None = None  # seconds

    def fits(self, count: int) -> int:
        """So many of `count` samples."""
        self._began = time.monotonic()
        left = self.deadline - self._began
        if left <= 0:
            return 0
        most = self.first if self._each is None else int(left / self._each)
        return min(count, most)

    def took(self, count: int, device: torch.device) -> None:
        """So many samples were given to the device, and are waited for."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        self._each = (time.monotonic() - self._began) / count
