"""The caller's side of a request, safe to use from any thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from mstar.errors import RequestStopped
from mstar.types import Event, GenerateResult, Usage, fold

__all__ = ["Handle"]

log = logging.getLogger("mstar")


class Handle:
    """A submitted request. Iterate for its events, or ask for the `result`."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.usage = Usage()  # the counts so far; they go up while the request runs
        self.cancel_request: Callable[[], None] = _nothing
        self._events: list[Event] = []
        self._error: BaseException | None = None
        self._done = False
        self._changed = threading.Condition()
        self._listeners: tuple[Callable[[], None], ...] = ()

    @property
    def done(self) -> bool:
        """Whether the request has ended, one way or another."""
        return self._done

    def result(self, timeout: float | None = None) -> GenerateResult:
        """Wait for the end and fold all events.

        Raises:
            TimeoutError: still running after `timeout` seconds; the request goes on.
            MStarError: the request failed, was cancelled or ran out of its own time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"request {self.request_id} is still running")
        if self._error is not None:
            raise self._error
        return fold(self._events, self.request_id)

    def __iter__(self) -> Iterator[Event]:
        """All events from the first on, as they come. Raises what `result` raises."""
        index = 0
        while True:
            with self._changed:
                while not self._done and len(self._events) <= index:
                    self._changed.wait()
                fresh = self._events[index:]
                done = self._done
            yield from fresh
            index += len(fresh)
            if done and index == len(self._events):
                break
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the request. Does nothing if it has ended."""
        self.cancel_request()

    def taken(self, index: int) -> tuple[list[Event], bool]:
        """The events from `index` on, and whether those are all there will be."""
        with self._changed:
            return self._events[index:], self._done

    def raise_for_error(self) -> None:
        """Raise what ended the request early, if anything did."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # the error holds this frame, and the handle the error

    def listen(self, callback: Callable[[], None]) -> None:
        """Call `callback()` after every change, on the engine's thread (at once if it is done)."""
        with self._changed:
            done = self._done
            if not done:
                self._listeners += (callback,)
        if done:
            callback()

    # -- the engine's side ---------------------------------------------------------------------

    def event(self, event: Event) -> None:
        """See `Sink.event`."""
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
        self._tell()

    def end(self, error: BaseException | None, usage: Usage) -> None:
        """See `Sink.end`."""
        with self._changed:
            if isinstance(error, RequestStopped):
                error.partial = fold(self._events, self.request_id)
                error.partial.usage = usage
                late = isinstance(error, TimeoutError)
                error.partial.finish_reason = "timeout" if late else "cancelled"
            self._error = error
            self._done = True
            self._changed.notify_all()
        self._tell()
        self._listeners = ()
        self.cancel_request = _nothing  # it holds the request, which holds this handle

    def _tell(self) -> None:
        for callback in self._listeners:
            try:
                callback()
            except Exception:
                log.exception("a listener of request %s raised", self.request_id)


def _nothing() -> None:
    pass
