"""How late the tool itself is."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

__all__ = ["watch_lag"]

_EVERY = 0.02


@contextlib.asynccontextmanager
async def watch_lag() -> AsyncIterator[list[float]]:
    """Collects how many seconds late the event loop is, fifty times a second.

    An idle loop is up to a millisecond late, which is the resolution of its timer.
    """
    late: list[float] = []

    async def watch() -> None:
        while True:
            due = time.perf_counter() + _EVERY
            await asyncio.sleep(_EVERY)
            late.append(max(0.0, time.perf_counter() - due))

    task = asyncio.create_task(watch())
    try:
        yield late
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
