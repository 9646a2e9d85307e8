"""Images that are kept for a while, so that a URL leads to them."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from mstar.errors import RequestFailed

__all__ = ["ImageStore"]


class ImageStore:
    """Files in memory under names that nobody guesses: bounded, and each gone after its time.

    Args:
        max_files: most files; the oldest leave for new ones.
        max_bytes: most bytes of all files together, likewise.
        seconds: how long a file is kept.
        clock: seconds from anywhere, never going back.
    """

    def __init__(
        self,
        max_files: int = 1000,
        max_bytes: int = 256 * 2**20,
        seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = seconds
        self._max_files, self._max_bytes, self._clock = max_files, max_bytes, clock
        self._files: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # oldest first
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._files)

    def add(self, data: bytes, extension: str) -> str:
        """Keep a file; returns the name under which it is found.

        Raises:
            RequestFailed: it is larger than all that may be kept.
        """
        if len(data) > self._max_bytes:
            raise RequestFailed("the image is too large to be kept; use response_format=b64_json")
        self.sweep()
        while len(self._files) >= self._max_files or self.bytes + len(data) > self._max_bytes:
            self._drop_oldest()
        name = f"{secrets.token_urlsafe(24)}.{extension}"
        self._files[name] = (self._clock() + self.seconds, data)
        self.bytes += len(data)
        return name

    def get(self, name: str) -> bytes | None:
        """The file of that name, if it is still there."""
        self.sweep()
        found = self._files.get(name)
        return found[1] if found is not None else None

    def sweep(self) -> None:
        """Drop the files whose time is over."""
        now = self._clock()
        while self._files and next(iter(self._files.values()))[0] <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, (_, data) = self._files.popitem(last=False)
        self.bytes -= len(data)
