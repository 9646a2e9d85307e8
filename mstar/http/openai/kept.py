"""What a later request may ask for: the text of sound, and images that a URL leads to."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from mstar.errors import RequestFailed

__all__ = ["Kept"]

T = TypeVar("T", bytes, str)


class Kept(Generic[T]):
    """Values in memory under names: bounded, and each gone after its time. Any thread may use it.

    Args:
        most: how many are kept; the oldest leave for new ones.
        most_size: bytes or characters of all together, likewise.
        seconds: how long each is kept.
        clock: the time, in seconds since 1970.
    """

    def __init__(
        self,
        most: int,
        most_size: int,
        seconds: float = 3600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.seconds, self.size = seconds, 0
        self._most, self._most_size, self._clock = most, most_size, clock
        self._kept: OrderedDict[str, tuple[int, T]] = OrderedDict()  # oldest first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, name: str, value: T) -> int:
        """Keep `value`; returns when it expires, in whole seconds since 1970.

        Raises:
            RequestFailed: it is larger than all that may be kept.
        """
        if len(value) > self._most_size:
            raise RequestFailed(
                "what was made is too large to be kept; ask for it itself: response_format=b64_json"
            )
        expires = int(self._clock() + self.seconds)
        with self._lock:
            self._kept[name] = expires, value
            self.size += len(value)
        self.sweep()
        return expires

    def get(self, name: str) -> T | None:
        """The value, if it is still there."""
        self.sweep()
        return self._kept.get(name, (0, None))[1]

    def sweep(self) -> None:
        """Drop what is too old or too much."""
        with self._lock:
            now = self._clock()
            while self._kept:
                expires, value = next(iter(self._kept.values()))
                full = len(self._kept) > self._most or self.size > self._most_size
                if expires > now and not full:
                    break
                self._kept.popitem(last=False)
                self.size -= len(value)
