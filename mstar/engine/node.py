"""A node: one component of a model, and how calls to it are batched."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from mstar.engine.traps import Call

__all__ = ["Node"]


class Node:
    """A component that serves calls in batches.

    Args:
        name: shown in statistics and errors.
        run: takes the payloads of a batch, returns one result for each, in order.
        key: calls share a batch only if this function of their payloads is equal (shapes, say).
        max_batch: most calls in a batch.
        cost: size of one payload (tokens, frames, ...); an error in it or in `key` is the caller's.
        max_cost: the most that the sizes in one batch may add up to; one call always fits.
        beside: run batches in a thread of their own, so that other nodes need not wait for them.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Any]], Sequence[Any]],
        *,
        key: Callable[[Any], Hashable] | None = None,
        max_batch: int = 64,
        cost: Callable[[Any], int] | None = None,
        max_cost: int | None = None,
        beside: bool = False,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}: must be at least 1")
        if (cost is None) != (max_cost is None):
            raise ValueError("cost and max_cost go together")
        self.name = name
        self.run = run
        self.key = key
        self.max_batch = max_batch
        self.cost = cost
        self.max_cost = max_cost
        self.beside = beside
        self.scheduled = False
        self.running = False
        self.batch_sizes: Counter[int] = Counter()
        self._queues: dict[Hashable, deque[Call]] = {}
        self._only: deque[Call] = deque()
        self._arrivals = 0
        if key is None:
            self._queues[None] = self._only

    def __call__(self, payload: Any) -> Call:
        """A call that a walk can await, `gather` or emit."""
        return Call(self, payload)

    def bind(self, schedule: Callable[[Node], None]) -> None:
        """Learn how to ask for a turn. For nodes whose calls can wait for more than the node."""

    @property
    def waiting(self) -> int:
        """Calls not yet taken into a batch. May be asked from any thread."""
        queues = list(self._queues.values())
        return sum(call.waiter is not None for queue in queues for call in list(queue))

    def enqueue(self, call: Call) -> None:
        """Add a call to those that wait."""
        if self.cost is not None:
            call.size = self.cost(call.payload)
        if self.key is None:
            self._only.append(call)
            return
        self._arrivals += 1
        call.sequence = self._arrivals
        key = self.key(call.payload)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = deque()
        queue.append(call)

    def withdrawn(self, call: Call) -> None:
        """A waiting or running call lost its waiter. It is passed over in `take`."""

    def take(self) -> list[Call]:
        """Remove and return the next batch, oldest calls first; empty if none can run now."""
        batch: list[Call] = []
        while queue := self._only if self.key is None else self._oldest_queue():
            room = self.max_cost
            while queue and len(batch) < self.max_batch:
                call = queue[0]
                if call.waiter is not None:
                    if room is not None:
                        room -= call.size
                        if room < 0 and batch:
                            break
                    batch.append(call)
                queue.popleft()
            if batch:
                break
        return batch

    def has_calls(self) -> bool:
        """Whether `take` might return something."""
        if self.key is None:
            return bool(self._only)
        return any(self._queues.values())

    def _oldest_queue(self) -> deque[Call]:
        for key in [k for k, queue in self._queues.items() if not queue]:
            del self._queues[key]
        if not self._queues:
            return self._only
        return min(self._queues.values(), key=lambda queue: queue[0].sequence)
