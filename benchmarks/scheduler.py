"""What one call through the runtime costs, with a node that does nothing.

    python benchmarks/scheduler.py

Prints microseconds per call with 1, 64 and 1,024 live walks: resuming the walk, making the call,
forming the batch, running it, delivering the result. Besides, the same number of awaits of
asyncio's own event loop (`await asyncio.sleep(0)`) as a yardstick.
"""

from __future__ import annotations

import asyncio
import statistics
import time

from mstar.engine.node import Node
from mstar.engine.runtime import Runtime

CALLS = 100_000
AIMS = {1: 6.0, 64: 3.0, 1024: 3.0}


def per_call(walks: int) -> float:
    """Seconds per call."""
    runtime, node = Runtime(), Node("nothing", lambda batch: batch, max_batch=4096)
    calls = CALLS // walks

    async def walk() -> None:
        for _ in range(calls):
            await node(None)

    async def all_walks() -> None:
        tasks = [runtime.spawn(walk()) for _ in range(walks)]
        for task in tasks:
            await task
        runtime.stop()

    runtime.spawn(all_walks())
    began = time.perf_counter()
    runtime.run()
    return (time.perf_counter() - began) / (calls * walks)


def per_sleep(tasks: int) -> float:
    """Seconds per `asyncio.sleep(0)`."""
    sleeps = CALLS // tasks

    async def work() -> None:
        for _ in range(sleeps):
            await asyncio.sleep(0)

    async def main() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(tasks)))
        return (time.perf_counter() - began) / (sleeps * tasks)

    return asyncio.run(main())


def main() -> None:
    print(f"{'walks':>6} {'us/call':>8} {'aim':>5} {'asyncio us/await':>17} {'ratio':>6}")
    for walks, aim in AIMS.items():
        ours = statistics.median(per_call(walks) for _ in range(5)) * 1e6
        other = statistics.median(per_sleep(walks) for _ in range(5)) * 1e6
        print(f"{walks:>6} {ours:>8.2f} {aim:>5.1f} {other:>17.2f} {ours / other:>6.2f}")


if __name__ == "__main__":
    main()
