"""When requests start."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

__all__ = ["Load", "arrivals", "offer"]


@dataclass(frozen=True)
class Load:
    """Either `concurrency` clients that each send the next request when the last one is done, or
    `rate` requests per second that arrive as a Poisson process, whatever the server does.

    It ends after `requests` requests, or when `seconds` have passed and the last one is done.
    """

    concurrency: int | None = 1
    rate: float | None = None
    requests: int | None = None
    seconds: float | None = None
    seed: int = 0


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds after the start at which requests arrive, without end."""
    dice = random.Random(seed)
    at = 0.0
    while True:
        at += dice.expovariate(rate)
        yield at


async def offer(load: Load, one: Callable[[int, float], Awaitable[None]]) -> None:
    """Run the load.

    Args:
        load: which.
        one: runs request number i; the second argument is when it was due (`perf_counter`).
    """
    began = time.perf_counter()
    numbers = itertools.count() if load.requests is None else iter(range(load.requests))
    tasks: set[asyncio.Task[None]] = set()
    try:
        if load.rate is None:
            for _ in range(load.concurrency or 1):
                tasks.add(asyncio.create_task(_client(load, began, numbers, one)))
        else:
            for number, at in zip(numbers, arrivals(load.rate, load.seed), strict=False):
                if load.seconds is not None and at > load.seconds:
                    break
                await asyncio.sleep(began + at - time.perf_counter())
                tasks.add(asyncio.create_task(one(number, began + at)))
                _forget_done(tasks)
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _client(
    load: Load, began: float, numbers: Iterator[int], one: Callable[[int, float], Awaitable[None]]
) -> None:
    while load.seconds is None or time.perf_counter() < began + load.seconds:
        number = next(numbers, None)
        if number is None:
            return
        await one(number, time.perf_counter())


def _forget_done(tasks: set[asyncio.Task[None]]) -> None:
    """Keep few finished tasks in memory, and meet their exceptions."""
    if len(tasks) % 256 == 0:
        for task in [task for task in tasks if task.done()]:
            tasks.discard(task)
            task.result()
