"""What a walk may wait for.

A walk is a coroutine. Whatever it awaits ends in a *trap*: an object that the coroutine yields to
the runtime, which begins it on behalf of a *waiter* and later hands the waiter a value or an error.
A waiter is anything with `resolve(value)` and `reject(error)`: a task, one branch of a `gather`, a
place in a request's output.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Protocol

__all__ = ["Call", "Park", "Sleep", "Trap", "Waiter", "gather", "sleep", "spawn", "start"]

_thread = threading.local()


class Waiter(Protocol):
    """Who is told how something ended. Neither method may raise."""

    def resolve(self, value: Any) -> None: ...

    def reject(self, error: BaseException) -> None: ...


class CallQueue(Protocol):
    """What a call needs of its node."""

    name: str

    def enqueue(self, call: Call) -> None: ...

    def withdrawn(self, call: Call) -> None: ...


class Begun(Protocol):
    """Something under way that can be ended: a trap or a task."""

    def withdraw(self) -> None: ...


class Scheduler(Protocol):
    """What traps need of the runtime."""

    current: Any

    def schedule(self, node: Any) -> None: ...

    def call_later(self, seconds: float, callback: Callable[..., None], *args: Any) -> Any: ...

    def spawn(
        self, coroutine: Coroutine[Any, Any, Any], *, parent: Any = None, waiter: Any = None
    ) -> Any: ...


class Trap:
    """Base of everything that a coroutine can be suspended on."""

    __slots__ = ()

    def __await__(self) -> Generator[Trap, Any, Any]:
        return (yield self)

    def begin(self, runtime: Scheduler, waiter: Waiter) -> None:
        """Arrange that `waiter` hears of the outcome."""
        raise NotImplementedError

    def withdraw(self) -> None:
        """Forget the waiter: it is told nothing any more."""
        raise NotImplementedError


class Call(Trap):
    """One use of a node: the unit that is batched."""

    __slots__ = ("node", "payload", "sequence", "size", "waiter")

    def __init__(self, node: CallQueue, payload: Any) -> None:
        self.node = node
        self.payload = payload
        self.waiter: Waiter | None = None
        self.sequence = 0
        self.size = 0

    def begin(self, runtime: Scheduler, waiter: Waiter) -> None:
        if self.waiter is not None:
            raise RuntimeError(f"a call of {self.node.name} was awaited twice")
        self.waiter = waiter
        self.node.enqueue(self)
        runtime.schedule(self.node)

    def withdraw(self) -> None:
        self.waiter = None
        self.node.withdrawn(self)


class Park(Trap):
    """Suspend until somebody resolves the waiter that `register` was given."""

    __slots__ = ("forget", "register", "waiter")

    def __init__(
        self, register: Callable[[Waiter], None], forget: Callable[[Waiter], None]
    ) -> None:
        self.register = register
        self.forget = forget
        self.waiter: Waiter | None = None

    def begin(self, runtime: Scheduler, waiter: Waiter) -> None:
        self.waiter = waiter
        self.register(waiter)

    def withdraw(self) -> None:
        if self.waiter is not None:
            self.forget(self.waiter)


class Sleep(Trap):
    """Suspend for some seconds."""

    __slots__ = ("seconds", "timer")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.timer: Any = None

    def begin(self, runtime: Scheduler, waiter: Waiter) -> None:
        self.timer = runtime.call_later(self.seconds, waiter.resolve, None)

    def withdraw(self) -> None:
        self.timer.cancel()


class _Branch:
    __slots__ = ("gather", "index")

    def __init__(self, gather: _Gather, index: int) -> None:
        self.gather = gather
        self.index = index

    def resolve(self, value: Any) -> None:
        self.gather.arrived(self.index, value)

    def reject(self, error: BaseException) -> None:
        self.gather.failed(self.index, error)


_NOTHING: Any = object()


class _Gather(Trap):
    __slots__ = ("begun", "branches", "pending", "results", "started", "waiter")

    def __init__(self, branches: tuple[Awaitable[Any], ...]) -> None:
        self.branches = branches
        self.begun: dict[int, Begun] = {}  # by index; without those that have ended
        self.started = 0
        self.results: list[Any] = [_NOTHING] * len(branches)
        self.pending = len(branches)
        self.waiter: Waiter | None = None

    def begin(self, runtime: Scheduler, waiter: Waiter) -> None:
        self.waiter = waiter
        if not self.branches:
            waiter.resolve([])
        try:
            for index, branch in enumerate(self.branches):
                self.started = index + 1
                begun = start(runtime, branch, _Branch(self, index))
                if self.waiter is None:  # it failed at once
                    return
                if self.results[index] is _NOTHING:  # it did not end at once
                    self.begun[index] = begun
        except BaseException:
            self.withdraw()
            raise

    def withdraw(self) -> None:
        self.waiter = None
        while self.begun:
            self.begun.popitem()[1].withdraw()
        for branch in self.branches[self.started :]:
            if inspect.iscoroutine(branch):
                branch.close()

    def arrived(self, index: int, value: Any) -> None:
        self.begun.pop(index, None)
        self.results[index] = value
        self.pending -= 1
        if self.pending == 0 and self.waiter is not None:
            self.waiter.resolve(self.results)

    def failed(self, index: int, error: BaseException) -> None:
        self.begun.pop(index, None)
        waiter = self.waiter
        if waiter is not None:
            self.withdraw()
            waiter.reject(error)


def gather(*branches: Awaitable[Any]) -> Awaitable[list[Any]]:
    """Run calls, coroutines and tasks together; their results in order.

    The first branch that fails ends the others and raises its error in the walk.
    """
    return _Gather(branches)


def sleep(seconds: float) -> Awaitable[None]:
    """Suspend the walk; others go on."""
    return Sleep(seconds)


def spawn(coroutine: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
    """Start a child walk of the running one. Await the task for its result.

    The child ends at the latest when its parent does; an error in it that nobody awaits is raised
    in the parent.
    """
    if not inspect.iscoroutine(coroutine):
        raise TypeError(f"spawn() takes a coroutine, not a {type(coroutine).__name__}")
    runtime: Scheduler | None = getattr(_thread, "runtime", None)
    if runtime is None or runtime.current is None:
        coroutine.close()
        raise RuntimeError("spawn() is for use inside a walk")
    return runtime.spawn(coroutine, parent=runtime.current)


def start(runtime: Scheduler, awaitable: Awaitable[Any], waiter: Waiter) -> Begun:
    """Begin anything that can be awaited; the returned object's `withdraw()` ends it."""
    if isinstance(awaitable, Trap):
        awaitable.begin(runtime, waiter)
        return awaitable
    if inspect.iscoroutine(awaitable):
        return runtime.spawn(awaitable, waiter=waiter)
    if inspect.isawaitable(awaitable):
        return runtime.spawn(_result_of(awaitable), waiter=waiter)
    raise TypeError(f"cannot wait for a {type(awaitable).__name__}: not a call or coroutine")


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def bind_thread(runtime: Scheduler | None) -> None:
    """Make `spawn` on this thread belong to `runtime`."""
    _thread.runtime = runtime
