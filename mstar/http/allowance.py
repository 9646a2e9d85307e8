"""What the media of one request may take, all together."""

from __future__ import annotations

import threading
import time

from mstar.errors import InvalidRequest
from mstar.http.settings import Settings

__all__ = ["Allowance"]


class Allowance:
    """What one request may still fetch: as many bytes and seconds as a body may have.

    Safe to use from several threads.
    """

    most = 64  # media of one request

    def __init__(self, settings: Settings) -> None:
        self._bytes, self._seconds = settings.max_media_bytes, settings.body_timeout
        self._end: float | None = None
        self._count = 0
        self._lock = threading.Lock()

    def begin(self, field: str) -> float:
        """Count one more; the seconds that are left.

        Raises:
            InvalidRequest: it is one too many, or no time is left.
        """
        with self._lock:
            self._count += 1
            self._end = self._end or time.monotonic() + self._seconds
            if self._count > self.most:
                raise InvalidRequest(field, None, f"more than {self.most} media are fetched")
            if self._end <= time.monotonic():
                raise InvalidRequest(field, None, "the media did not come in time")
            return self._end - time.monotonic()

    def left(self) -> int:
        """The bytes that are left."""
        return self._bytes

    def take(self, count: int) -> bool:
        """Whether there was room for these bytes."""
        with self._lock:
            self._bytes -= count
            return self._bytes >= 0
