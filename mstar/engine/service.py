"""A thread that serves requests: admission, cancellation, deadlines, and the end of it all."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from mstar.engine.memory import is_out_of_memory
from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.engine.runtime import Runtime
from mstar.engine.stats import Recorder
from mstar.engine.threads import use_threads
from mstar.errors import EngineClosed, EngineOverloaded, InvalidRequest, RequestCancelled

__all__ = ["Service"]

log = logging.getLogger("mstar")

Walk = Callable[[Request], Coroutine[Any, Any, str | None]]


class Service:
    """Walks requests on a thread of its own, at most so many at a time; the others wait in line.

    Args:
        walk: makes the coroutine of a request.
        nodes: what walks call.
        device: where the nodes run.
        cpu_threads: threads that operations on a CPU use.
        max_running: most requests that are walked at a time.
        max_queue: most requests that wait.
    """

    def __init__(
        self,
        walk: Walk,
        nodes: Sequence[Node],
        *,
        device: torch.device,
        cpu_threads: int,
        max_running: int,
        max_queue: int,
    ) -> None:
        self.max_running = max_running
        self.max_queue = max_queue
        self.recorder = Recorder()
        self._walk: Walk | None = walk
        self._runtime = Runtime(
            is_out_of_memory=is_out_of_memory,
            lane_context=partial(_lane, device, max(1, cpu_threads // 4)),
            hand_over=_stream_event if device.type == "cuda" else _nothing_to_wait_for,
        )
        for node in nodes:
            node.bind(self._runtime.schedule)
        self._lock = threading.Lock()
        self._live: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._running = 0
        self._closed = False
        self._death: BaseException | None = None
        self._process = os.getpid()
        self.thread = threading.Thread(
            target=self._serve, args=(device, cpu_threads), name="mstar-engine", daemon=True
        )
        self.thread.start()

    # -- from any thread ---------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Put a request in line.

        Raises:
            InvalidRequest: a live request has its id.
            EngineOverloaded: the line is full.
            EngineClosed: the service was closed or has died.
        """
        request.on_end = self._ended
        with self._lock:
            self.check_open()
            if request.id in self._live:
                raise InvalidRequest("request_id", request.id, "a live request has this id")
            if len(self._live) >= self.max_running + self.max_queue:
                self.recorder.rejected += 1
                raise EngineOverloaded(
                    f"{len(self._live)} requests are running or waiting, the limit is "
                    f"{self.max_running} + {self.max_queue}"
                )
            self._live[request.id] = request
            self._runtime.post(self._admit, request)

    def cancel(self, request: Request) -> None:
        """End a request with `RequestCancelled`, unless it has ended."""
        reason = RequestCancelled(f"request {request.id} was cancelled")
        self._runtime.post(request.stop, reason)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call `function()` on the service's thread, between batches, and wait for its result."""
        done = threading.Event()
        outcome: list[Any] = [None, None]

        def work() -> None:
            try:
                outcome[0] = function()
            except BaseException as error:
                outcome[1] = error
            finally:
                done.set()

        self.check_open()
        self._runtime.post(work)
        while not done.wait(0.1):
            self.check_open()
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def counts(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        with self._lock:
            return self._running, len(self._live) - self._running

    def check_open(self) -> None:
        """Raise `EngineClosed` if requests cannot be served."""
        if self._death is not None:
            raise EngineClosed(f"the engine died: {self._death}") from self._death
        if self._closed:
            raise EngineClosed("the engine is closed")
        if os.getpid() != self._process:
            raise EngineClosed(
                "this process was forked from the one that the engine runs in, and a fork has no "
                "threads: make an engine of its own in each process"
            )

    def close(self) -> None:
        """Cancel what is live and end the thread. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if os.getpid() != self._process:
            return
        self._runtime.post(self._stop_all, _was_closed)
        self._runtime.stop()
        if threading.current_thread() is not self.thread:
            self.thread.join()
            self._stop_all(_was_closed)
            self._walk = None

    # -- on the service's thread ---------------------------------------------------------------

    def _serve(self, device: torch.device, cpu_threads: int) -> None:
        try:
            use_threads(cpu_threads)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            with torch.inference_mode():
                self._runtime.run()
        except BaseException as error:
            log.exception("the engine's thread died")
            with self._lock:
                self._death = error
            self._stop_all(partial(_has_died, error))

    def _admit(self, request: Request) -> None:
        request.arm(self._runtime)
        self._waiting.append(request)
        self._begin_waiting()

    def _begin_waiting(self) -> None:
        while self._waiting and self._running < self.max_running and not self._closed:
            request = self._waiting.popleft()
            if request.state == "queued":
                self._running += 1
                request.begin(self._runtime, self._walk)

    def _ended(self, request: Request, was: str) -> None:
        with self._lock:
            self._live.pop(request.id, None)
        if was == "running":
            self._running -= 1
        elif request in self._waiting:
            self._waiting.remove(request)
        self.recorder.record(request)
        self._begin_waiting()

    def _stop_all(self, reason: Callable[[], BaseException]) -> None:
        self._waiting.clear()
        for request in list(self._live.values()):
            request.stop(reason())


def _was_closed() -> BaseException:
    return RequestCancelled("the engine was closed")


def _has_died(error: BaseException) -> BaseException:
    failure = EngineClosed(f"the engine died: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _stream_event() -> Callable[[], None]:
    """What is queued on this thread's stream now is done before the other one's goes on."""
    event = torch.cuda.Event()
    event.record()
    return lambda: torch.cuda.current_stream().wait_event(event)


def _nothing_to_wait_for() -> Callable[[], None]:
    return lambda: None


@contextlib.contextmanager
def _lane(device: torch.device, cpu_threads: int) -> Iterator[None]:
    """What runs beside the service's thread has a share of the cores, or a stream of its own."""
    use_threads(cpu_threads)
    side = contextlib.nullcontext()
    if device.type == "cuda":
        side = torch.cuda.stream(torch.cuda.Stream(device))
    with torch.inference_mode(), side:
        yield
