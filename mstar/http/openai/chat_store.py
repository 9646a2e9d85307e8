"""What was said in replies made of sound, so that later messages can refer back to it."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["Transcripts"]


class Transcripts:
    """Transcripts by id: kept for a while, and only so many of them. Safe to use from any thread.

    Args:
        most: how many are kept; the oldest goes first.
        most_chars: how many characters all of them may hold together.
        seconds: how long each is kept.
        clock: the time, in seconds since 1970.
    """

    def __init__(
        self,
        most: int = 4096,
        most_chars: int = 16 * 2**20,
        seconds: float = 3600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._most, self._most_chars, self._seconds = most, most_chars, seconds
        self._clock = clock
        self._kept: OrderedDict[str, tuple[float, str]] = OrderedDict()  # oldest first
        self._chars = 0
        self._lock = threading.Lock()

    @staticmethod
    def new_id() -> str:
        """An id that nobody can guess."""
        return f"audio_{uuid.uuid4().hex}"

    def put(self, id: str, text: str) -> int:
        """Keep a transcript; returns when it expires, in whole seconds since 1970."""
        expires = int(self._clock() + self._seconds)
        with self._lock:
            self._kept[id] = (expires, text)
            self._chars += len(text)
            self._tidy()
        return expires

    def get(self, id: str) -> str | None:
        """The transcript, if it is still there."""
        with self._lock:
            self._tidy()
            _, text = self._kept.get(id, (0, None))
            return text

    def __len__(self) -> int:
        return len(self._kept)

    def _tidy(self) -> None:
        now = self._clock()
        while self._kept:
            expires, text = next(iter(self._kept.values()))
            full = len(self._kept) > self._most or self._chars > self._most_chars
            if expires > now and not full:
                break
            self._kept.popitem(last=False)
            self._chars -= len(text)
