"""The microkernel that drives walks.

It knows tasks, calls, nodes and timers, and nothing about models, media or requests:

- A task is resumed until it traps. Then the trap is begun and the task sleeps.
- When no task can go on, the next node that has calls runs one batch, and the tasks that waited for
  it are ready again. Nodes take turns, so no node starves another.
- All of it happens on one thread. Other threads post functions with `post`.
- A task ends together with its children. Ending a task closes its coroutine, so `with` and
  `finally` inside it are what gives resources back.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mstar.engine.lane import Lane
from mstar.engine.node import Node
from mstar.engine.traps import Call, Park, Trap, Waiter, bind_thread

__all__ = ["Runtime", "Task", "Timer"]

log = logging.getLogger("mstar")

_LONGEST_SLEEP = 3600.0  # platforms limit how long a wait may be


class Task:
    """A running coroutine. Awaiting it gives its result or raises its error."""

    __slots__ = (
        "children",
        "coroutine",
        "done",
        "error",
        "observers",
        "owner",
        "parent",
        "ready",
        "result",
        "runtime",
        "send",
        "waiting",
    )

    def __init__(
        self, runtime: Runtime, coroutine: Coroutine[Any, Any, Any], owner: Waiter | None
    ) -> None:
        self.runtime = runtime
        self.owner = owner
        self.ready = runtime.ready
        self.coroutine = coroutine
        self.send = coroutine.send
        self.parent: Task | None = None
        self.children: set[Task] | None = None
        self.waiting: Trap | None = None
        self.observers: list[Waiter] = []
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def resolve(self, value: Any) -> None:
        """Resume with a value."""
        self.waiting = None
        self.ready.append((self, value, None))

    def reject(self, error: BaseException) -> None:
        """Resume by raising an error."""
        self.waiting = None
        self.ready.append((self, None, error))

    def interrupt(self, error: BaseException) -> None:
        """Raise `error` where the task is suspended, whatever it waits for.

        If it is about to be resumed, that is with the error; an earlier error stays.
        """
        if self.done:
            return
        if self.waiting is not None:
            self.waiting.withdraw()
            self.reject(error)
            return
        for index, (task, _, earlier) in enumerate(self.ready):
            if task is self and earlier is None:
                self.ready[index] = (self, None, error)

    def withdraw(self) -> None:
        """End the task and its children now. The owner is told nothing; tasks that await this one
        get an error."""
        if self.done:
            return
        self.done = True
        self.error = RuntimeError("the task was ended before it was done")
        if self.waiting is not None:
            self.waiting.withdraw()
            self.waiting = None
        self.end_children()
        if self.parent is not None:
            self.parent.children.discard(self)
        while self.observers:
            self.observers.pop().reject(self.error)
        try:
            self.coroutine.close()
        except Exception:
            log.exception("a walk raised while it was being ended")

    def end_children(self) -> None:
        """End whatever this task spawned."""
        while self.children:
            self.children.pop().withdraw()

    def __await__(self) -> Any:
        if not self.done:
            yield Park(self.observers.append, self.forget)
        if self.error is not None:
            raise self.error
        return self.result

    def forget(self, waiter: Waiter) -> None:
        """Tell `waiter` nothing when the task ends."""
        if waiter in self.observers:
            self.observers.remove(waiter)


class Timer:
    """A function to be called later, unless cancelled first."""

    __slots__ = ("args", "at", "callback")

    def __init__(self, at: float, callback: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.at = at
        self.callback: Callable[..., None] | None = callback
        self.args = args

    def __lt__(self, other: Timer) -> bool:
        return self.at < other.at

    def cancel(self) -> None:
        """Do not call it any more."""
        self.callback = None
        self.args = ()


class Runtime:
    """Drives tasks and runs nodes, on the thread that calls `run`.

    Args:
        is_out_of_memory: tells which errors of a node mean that a smaller batch might do.
        lane_context: context manager for the worker thread of nodes marked `beside`.
        hand_over: called when such a node gets a batch; what it returns is called in that thread
            before the batch runs (there, a device's stream waits for what made the payloads).
    """

    def __init__(
        self,
        *,
        is_out_of_memory: Callable[[BaseException], bool] = lambda e: isinstance(e, MemoryError),
        lane_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        hand_over: Callable[[], Callable[[], None]] = lambda: lambda: None,
    ) -> None:
        self.ready: deque[tuple[Task, Any, BaseException | None]] = deque()
        self.current: Task | None = None
        self._is_out_of_memory = is_out_of_memory
        self._lane_context = lane_context
        self._hand_over = hand_over
        self._due: deque[Node] = deque()
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._wake = threading.Event()
        self._timers: list[Timer] = []
        self._most_timers = 64
        self._lane: Lane | None = None
        self._stopping = False

    # -- from any thread ---------------------------------------------------------------------

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Call `function(*args)` on the runtime's thread."""
        self._inbox.append((function, args))
        self._wake.set()

    def stop(self) -> None:
        """Let `run` return once what was posted before is done."""
        self.post(setattr, self, "_stopping", True)

    # -- on the runtime's thread -------------------------------------------------------------

    def spawn(
        self,
        coroutine: Coroutine[Any, Any, Any],
        *,
        parent: Task | None = None,
        waiter: Waiter | None = None,
    ) -> Task:
        """Start a task. Its owner, `waiter`, hears of its end; without one, errors that nobody
        awaits go to `parent`."""
        task = Task(self, coroutine, waiter)
        if parent is not None:
            task.parent = parent
            if parent.children is None:
                parent.children = set()
            parent.children.add(task)
        self.ready.append((task, None, None))
        return task

    def schedule(self, node: Node) -> None:
        """Give `node` a turn: it has calls, or those it has may have become runnable."""
        if not node.scheduled and not node.running:
            node.scheduled = True
            self._due.append(node)

    def call_later(self, seconds: float, callback: Callable[..., None], *args: Any) -> Timer:
        """Call `callback(*args)` after some seconds."""
        timer = Timer(time.monotonic() + max(0.0, seconds), callback, args)
        if len(self._timers) >= self._most_timers:  # cancelled ones are forgotten now and then
            self._timers = [other for other in self._timers if other.callback is not None]
            heapq.heapify(self._timers)
            self._most_timers = max(64, 2 * len(self._timers))
        heapq.heappush(self._timers, timer)
        return timer

    def run(self) -> None:
        """Serve until `stop`. Tasks that are left then are not ended: that is the caller's."""
        bind_thread(self)
        try:
            while not self._stopping:
                self.turn()
                if not (self._due or self.ready or self._inbox or self._stopping):
                    self._sleep()
        finally:
            if self._lane is not None:
                self._lane.close()
                self._lane = None
            bind_thread(None)

    def turn(self) -> None:
        """One round: what was posted, timers, every ready task, one batch."""
        if self._inbox:
            self._run_inbox()
        if self._timers and self._timers[0].at <= time.monotonic():
            self._run_timers()
        if self.ready:
            self._run_tasks()
        if self._due:
            self._run_node(self._due.popleft())

    # -- inside ------------------------------------------------------------------------------

    def _sleep(self) -> None:
        timeout = None
        if self._timers:
            timeout = min(max(0.0, self._timers[0].at - time.monotonic()), _LONGEST_SLEEP)
        self._wake.wait(timeout)
        self._wake.clear()

    def _run_inbox(self) -> None:
        while self._inbox:
            function, args = self._inbox.popleft()
            function(*args)

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0].at <= now:
            timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback(*timer.args)

    def _run_tasks(self) -> None:
        ready = self.ready
        while ready:
            task, value, error = ready.popleft()
            if task.done:
                continue
            self.current = task
            try:
                trap = task.send(value) if error is None else task.coroutine.throw(error)
            except StopIteration as end:
                self._finish(task, end.value, None)
            except BaseException as failure:
                self._finish(task, None, failure)
            else:
                task.waiting = trap
                try:
                    trap.begin(self, task)
                except BaseException as failure:
                    task.reject(failure if isinstance(trap, Trap) else _not_ours(trap))
        self.current = None

    def _finish(self, task: Task, result: Any, error: BaseException | None) -> None:
        task.done = True
        task.result, task.error = result, error
        task.end_children()
        parent = task.parent
        if parent is not None:
            parent.children.discard(task)
        waiters, task.observers = task.observers, []
        if task.owner is not None:
            waiters.insert(0, task.owner)
        for waiter in waiters:
            if error is None:
                waiter.resolve(result)
            else:
                waiter.reject(error)
        if error is None or waiters:
            return
        if parent is not None:
            parent.interrupt(error)
        else:
            log.error("a walk failed that nobody waits for", exc_info=error)

    def _run_node(self, node: Node) -> None:
        node.scheduled = False
        if node.running:
            return
        batch = node.take()
        if not batch:
            return
        if node.beside:
            node.running = True
            if self._lane is None:
                self._lane = Lane("mstar-lane", self._lane_context)
            ready = self._hand_over()

            def work() -> None:
                ready()
                self.post(self._back_from_lane, node, self._run(node, batch))

            self._lane.submit(work)
            return
        self._deliver(self._run(node, batch))
        if node.has_calls():
            self.schedule(node)

    def _back_from_lane(self, node: Node, outcomes: list[tuple[Call, Any, Any]]) -> None:
        node.running = False
        self._deliver(outcomes)
        if node.has_calls():
            self.schedule(node)

    def _run(self, node: Node, batch: list[Call]) -> list[tuple[Call, Any, BaseException | None]]:
        """Run a batch. If it raises, run its calls in halves (memory) or alone (anything else)."""
        node.batch_sizes[len(batch)] += 1
        try:
            results = node.run([call.payload for call in batch])
            if len(results) != len(batch):
                raise RuntimeError(
                    f"{node.name} returned {len(results)} results for {len(batch)} calls"
                )
            return [(call, result, None) for call, result in zip(batch, results)]  # noqa: B905
        except BaseException as error:
            if len(batch) == 1:
                return [(batch[0], None, error)]
            size = len(batch) // 2 if self._is_out_of_memory(error) else 1
        outcomes = []
        for first in range(0, len(batch), size):
            outcomes += self._run(node, batch[first : first + size])
        return outcomes

    def _deliver(self, outcomes: list[tuple[Call, Any, BaseException | None]]) -> None:
        for call, result, error in outcomes:
            waiter = call.waiter
            if waiter is None:
                continue
            if error is None:
                waiter.resolve(result)
            else:
                waiter.reject(error)


def _not_ours(trap: object) -> TypeError:
    return TypeError(f"a walk cannot wait for {trap!r}: only for calls and what is made of them")
