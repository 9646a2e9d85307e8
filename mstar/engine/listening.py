"""Events of requests on an event loop, which other work of the loop need not wait for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from weakref import WeakKeyDictionary

from mstar.engine.handle import Handle
from mstar.types import Event

__all__ = ["merged"]

_AT_ONCE = 8  # coroutines that are resumed before the loop looks after its sockets again


class _Bell:
    """Wakes coroutines of one event loop from other threads.

    A batch of the engine may have news for hundreds of requests. The loop is woken once for all,
    and resumes a few at a time: between them it accepts, reads and answers as if it were idle.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call_soon, self._call_soon_threadsafe = loop.call_soon, loop.call_soon_threadsafe
        self._due: deque[Callable[[], None]] = deque()
        self._rung = False

    def ring(self, wake: Callable[[], None]) -> None:
        """Have `wake` called on the loop. Any thread may."""
        self._due.append(wake)
        if not self._rung:  # two threads may both find it so: then it rings twice
            self._rung = True
            try:
                self._call_soon_threadsafe(self._answer)
            except RuntimeError:
                self._due.clear()  # the loop was closed

    def _answer(self) -> None:
        for _ in range(min(len(self._due), _AT_ONCE)):
            self._due.popleft()()
        if self._due:
            self._call_soon(self._answer)
            return
        self._rung = False
        if self._due:  # somebody came between the two lines before
            self.ring(_nothing)


_bells: WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell] = WeakKeyDictionary()


async def merged(handles: Sequence[Handle]) -> AsyncIterator[tuple[int, list[Event]]]:
    """The events of all requests as they come, each batch with the number of its request.

    Raises:
        MStarError: what ended any of them early.
    """
    loop = asyncio.get_running_loop()
    bell = _bells.get(loop) or _bells.setdefault(loop, _Bell(loop))
    waiter: asyncio.Future[None] | None = None
    told = False

    def tell() -> None:  # on the engine's thread
        nonlocal told
        if not told:
            told = True
            bell.ring(wake)

    def wake() -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    for handle in handles:
        handle.listen(tell)
    live = {index: (handle, 0) for index, handle in enumerate(handles)}  # -> events taken so far
    try:
        while live:
            told, idle = False, True
            for index, (handle, taken) in list(live.items()):
                events, done = handle.taken(taken)
                if events:
                    idle = False
                    live[index] = handle, taken + len(events)
                    yield index, events
                if done:
                    handle.raise_for_error()
                    del live[index]
            if idle and live:
                waiter = loop.create_future()  # nothing else runs on the loop until it is awaited
                await waiter
    finally:
        del handles, handle, live  # an error holds this frame, and a handle its error


def _nothing() -> None:
    pass
