"""What the media of one request may take, all together."""

from __future__ import annotations

import threading
import time
from contextvars import ContextVar

from mstar.errors import InvalidRequest
from mstar.http.settings import Settings

__all__ = ["Allowance", "allowance_of", "new_allowance"]

_TIMES = 4  # as much as one of them may have


class Allowance:
    """What the media of one request may still take. Those that are fetched: as many bytes and
    seconds as a body; all of them: a few times the pixels, sound and frames of one.

    Safe to use from several threads.
    """

    most = 64  # media of one request

    def __init__(self, settings: Settings) -> None:
        self._bytes, self._seconds = settings.max_body_bytes, settings.body_timeout
        self._decoded = {
            "pixels": _TIMES * settings.max_pixels,
            "seconds of sound": _TIMES * settings.max_audio_seconds,
            "frames of video": _TIMES * settings.max_video_frames,
        }
        self._most = dict(self._decoded)
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

    def decode(self, what: str, count: float) -> str:
        """Count what is about to be decoded: what is wrong with that, or the empty string."""
        with self._lock:
            self._decoded[what] -= count
            if self._decoded[what] >= 0:
                return ""
        return f"the media of one request have more than {self._most[what]:g} {what} together"


_current: ContextVar[Allowance] = ContextVar("mstar_media_allowance")


def new_allowance(settings: Settings) -> None:
    """A new request begins: what the context of the caller takes counts together from here on."""
    _current.set(Allowance(settings))


def allowance_of(settings: Settings) -> Allowance:
    """That of the request that is being served; a new one outside of any."""
    return _current.get(None) or Allowance(settings)
