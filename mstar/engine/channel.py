"""A channel between walks: one puts, another iterates."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from mstar.engine.traps import Park, Waiter

__all__ = ["Channel"]


class Channel:
    """A first-in-first-out queue of a walk and its children.

    Args:
        capacity: `put` waits while this many items are queued; None for no limit.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity={capacity}: must be at least 1, or None")
        self.capacity = capacity
        self.closed = False
        self._items: deque[Any] = deque()
        self._readers: deque[Waiter] = deque()
        self._writers: deque[Waiter] = deque()
        self._error: BaseException | None = None

    def __len__(self) -> int:
        return len(self._items)

    def send(self, item: Any) -> None:
        """Put without waiting, whatever the capacity."""
        if self.closed:
            raise RuntimeError("the channel is closed")
        self._items.append(item)
        _wake(self._readers)

    async def put(self, item: Any) -> None:
        """Put an item, waiting while the channel is full."""
        while self.capacity is not None and len(self._items) >= self.capacity and not self.closed:
            await Park(self._writers.append, self._writers.remove)
        self.send(item)

    def close(self, error: BaseException | None = None) -> None:
        """No more items: readers see the end, or `error`, once the queue is empty."""
        self.closed = True
        self._error = self._error or error
        _wake(self._readers)
        _wake(self._writers)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        while not self._items:
            if self.closed:
                raise self._error or StopAsyncIteration
            await Park(self._readers.append, self._readers.remove)
        item = self._items.popleft()
        _wake(self._writers)
        return item


def _wake(waiters: deque[Waiter]) -> None:
    """Let all of them look again: one that is woken alone might end before it looks."""
    while waiters:
        waiters.popleft().resolve(None)
