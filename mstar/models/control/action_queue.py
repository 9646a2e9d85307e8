"""Chunks on their way to the robot, and how many rows of the next one come too late."""

from __future__ import annotations

import math
from threading import Lock

import numpy as np

__all__ = ["ActionQueue", "delay_steps", "lengthened"]


class ActionQueue:
    """Rows of the current chunk, twice: as the model made them, and as the robot takes them.

    Any thread may use it; nothing takes longer than a copy of a chunk.

    Args:
        rtc: whether a new chunk replaces the old one; otherwise it is appended.
        literal: trust the measured delay, as lerobot does, even where it exceeds what the robot
            has consumed since the inference began, which makes the arm jump.
    """

    def __init__(self, *, rtc: bool = True, literal: bool = False) -> None:
        self.rtc = rtc
        self.literal = literal
        self._lock = Lock()
        self.clear()

    def get(self) -> np.ndarray | None:
        """The next row for the robot, if there is one."""
        with self._lock:
            if self._processed is None or self._index >= len(self._processed):
                return None
            self._index += 1
            return self._processed[self._index - 1]

    @property
    def index(self) -> int:
        """How many rows of the current chunk were taken."""
        return self._index

    def __len__(self) -> int:
        """Rows that are left."""
        with self._lock:
            return 0 if self._processed is None else len(self._processed) - self._index

    def left_over(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Rows that are left, `[rows, dims]`: as the model made them, as the robot takes them."""
        with self._lock:
            if self._processed is None:
                return None
            return self._original[self._index :], self._processed[self._index :]

    def clear(self) -> None:
        """Drop all rows."""
        with self._lock:
            self._original: np.ndarray | None = None
            self._processed: np.ndarray | None = None
            self._index = 0

    def merge(
        self,
        original: np.ndarray,
        processed: np.ndarray,
        delay: int = 0,
        index_before: int | None = None,
    ) -> int:
        """Take in a chunk.

        Args:
            original, processed: the chunk in both forms, `[rows, dims]`.
            delay: control steps that its inference took.
            index_before: `index` when that began.

        Returns:
            Rows of it that were skipped.
        """
        with self._lock:
            skipped = 0
            if self.rtc:
                if not self.literal and index_before is not None and self._processed is not None:
                    delay = min(delay, self._index - index_before)
                skipped = max(0, min(delay, len(original)))
                original, processed = original[skipped:], processed[skipped:]
            elif self._processed is not None:
                original = np.concatenate([self._original[self._index :], original])
                processed = np.concatenate([self._processed[self._index :], processed])
            self._original, self._processed, self._index = original, processed, 0
            return skipped


def delay_steps(seconds: float, fps: float) -> int:
    """Control steps in a time, rounded up."""
    return math.ceil(seconds * fps)


def lengthened(chunk: np.ndarray, rows: int) -> np.ndarray:
    """A chunk `[rows, dims]`: cut, or with its last row repeated."""
    if not len(chunk):
        raise ValueError("a chunk without rows cannot be lengthened")
    if len(chunk) >= rows:
        return chunk[:rows]
    return np.concatenate([chunk, np.repeat(chunk[-1:], rows - len(chunk), 0)])
