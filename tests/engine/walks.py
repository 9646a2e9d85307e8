"""Drive walks to their end in the test's own thread."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from mstar.engine.runtime import Runtime
from mstar.engine.traps import Park, bind_thread


class Outcome:
    """A waiter that remembers what it was told."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.told = 0

    def resolve(self, value: Any) -> None:
        self.value, self.told = value, self.told + 1

    def reject(self, error: BaseException) -> None:
        self.error, self.told = error, self.told + 1


def resume(runtime: Runtime) -> None:
    """Resume every walk that is ready, but run no node."""
    bind_thread(runtime)
    try:
        runtime._run_tasks()
    finally:
        bind_thread(None)


def settle(runtime: Runtime, turns: int = 100_000) -> int:
    """Turn until nothing can go on; the number of turns. More than `turns` is a livelock."""
    bind_thread(runtime)
    try:
        for turn in range(turns):
            if not (runtime.ready or runtime._due or runtime._inbox):
                return turn
            runtime.turn()
    finally:
        bind_thread(None)
    raise AssertionError(f"still busy after {turns} turns")


def outcomes(*walks: Coroutine[Any, Any, Any], runtime: Runtime | None = None) -> list[Outcome]:
    """Run walks together until nothing can go on. None of them may be left suspended."""
    runtime = runtime or Runtime()
    ends = [Outcome() for _ in walks]
    for walk, end in zip(walks, ends, strict=True):
        runtime.spawn(walk, waiter=end)
    settle(runtime)
    assert [end.told for end in ends] == [1] * len(ends), "a walk is stuck, or ended twice"
    return ends


def results(*walks: Coroutine[Any, Any, Any], runtime: Runtime | None = None) -> list[Any]:
    """What the walks return; the first error is raised."""
    ends = outcomes(*walks, runtime=runtime)
    for end in ends:
        if end.error is not None:
            raise end.error
    return [end.value for end in ends]


class Gate:
    """`await gate.wait()` suspends until `open()`; counts who waits."""

    def __init__(self) -> None:
        self.waiters: list[Any] = []

    def wait(self) -> Park:
        return Park(self.waiters.append, self.waiters.remove)

    def open(self, value: Any = None) -> None:
        while self.waiters:
            self.waiters.pop(0).resolve(value)
