"""What all routes of one app share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mstar.http.errors import RETRY_AFTER, Refused
from mstar.http.metrics import Metrics
from mstar.http.settings import Settings

__all__ = ["Front"]

# Work on less than this many bytes is done at once: a hop to another thread would take longer.
_SMALL = 64 * 1024
# Few threads, for each one that has something to do delays the event loop's turns.
_WORKERS = ThreadPoolExecutor(2, "mstar-http")


class Front:
    """One engine and how it is shown to the network.

    Args:
        engine: the Engine.
        settings: see there.
    """

    def __init__(self, engine: Any, settings: Settings) -> None:
        self.engine = engine
        self.card = engine.card
        self.settings = settings
        self.metrics = Metrics(engine)
        self.draining = False
        self.busy = 0  # requests between their first and their last byte
        self.live: set[Any] = set()  # handles of the engine

    def check_open(self) -> None:
        """Raise if no new work is taken: draining, or the engine has gone."""
        if self.draining:
            headers = {"retry-after": str(RETRY_AFTER), "connection": "close"}
            raise Refused(503, "the server is shutting down", kind="EngineClosed", headers=headers)
        try:
            self.engine.health()
        except Exception as error:
            raise Refused(503, str(error), kind="EngineClosed") from None

    def timeout(self, asked: float | None) -> float | None:
        """Seconds for a request: what the client asks for, at most what the operator allows."""
        limits = [limit for limit in (asked, self.settings.request_timeout) if limit is not None]
        return min(limits, default=None)

    def cancel_all(self) -> None:
        """End every live request."""
        for handle in list(self.live):
            handle.cancel()


async def off_loop(function: Callable[..., Any], *args: Any, size: int = _SMALL) -> Any:
    """Call `function` away from the event loop, unless it has only few bytes to work on."""
    if size < _SMALL:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(_WORKERS, function, *args)
