"""A request inside the engine: its walk, its output in order, its end."""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import numpy as np

from mstar.engine.runtime import Runtime, Task, Timer
from mstar.engine.traps import Trap, start
from mstar.errors import MStarError, RequestFailed, RequestStopped, RequestTimeout
from mstar.types import (
    ActionChunk,
    AudioChunk,
    Event,
    ImageChunk,
    LatentChunk,
    ProgressChunk,
    TextChunk,
    Usage,
)

__all__ = ["Request", "Sink"]


class Sink(Protocol):
    """Who receives a request's events. Called on the engine's thread; must not block."""

    def event(self, event: Event) -> None:
        """One more event."""

    def end(self, error: BaseException | None, usage: Usage) -> None:
        """No more events: the request is complete, or failed with `error`."""


class Request:
    """What a walk sees of its request.

    Args:
        id: unique among the live requests.
        inputs: what the model's `prepare` made of the caller's input.
        params: validated parameters.
        output_modalities: what is asked for.
        stream: whether the caller takes events as they come.
        timeout: seconds from now until the request is given up.
        sample_rate: of the audio that the model makes, in Hz.
    """

    def __init__(
        self,
        id: str,
        inputs: Any,
        params: dict[str, Any],
        output_modalities: tuple[str, ...],
        sink: Sink,
        *,
        stream: bool = False,
        timeout: float | None = None,
        sample_rate: int | None = None,
    ) -> None:
        self.id = id
        self.inputs = inputs
        self.params = params
        self.output_modalities = output_modalities
        self.stream = stream
        self.usage = Usage()
        self.submitted = time.monotonic()
        self.state = "queued"
        self.on_end: Callable[[Request, str], None] = lambda request, was: None
        self.sink = sink
        self._deadline = None if timeout is None else self.submitted + timeout
        self._lines: dict[str, _Line] = {}
        self._runtime: Runtime | None = None
        self._task: Task | None = None
        self._timer: Timer | None = None
        self._reason: str | None = None
        self._sample_rate = sample_rate

    # -- for walks ---------------------------------------------------------------------------

    def emit_text(self, text: str | Awaitable[str], **metadata: Any) -> None:
        """Give the caller whole characters of text, or what an awaitable makes of them."""
        self._emit("text", text, lambda value: TextChunk(value, metadata=metadata))

    def emit_audio(self, pcm: np.ndarray | Awaitable[np.ndarray], sample_rate: int) -> None:
        """Give the caller mono int16 samples, or those that an awaitable makes."""
        self._emit("audio", pcm, lambda value: AudioChunk(value, sample_rate))

    def emit_image(self, png: bytes | Awaitable[bytes], **metadata: Any) -> None:
        """Give the caller an encoded image."""
        self._emit("image", png, lambda value: ImageChunk(value, metadata=metadata))

    def emit_actions(self, actions: np.ndarray | Awaitable[np.ndarray], **metadata: Any) -> None:
        """Give the caller robot actions, float32 `[horizon, action_dim]`."""
        self._emit("action", actions, lambda value: ActionChunk(value, metadata=metadata))

    def emit_latents(self, latents: np.ndarray | Awaitable[np.ndarray], **metadata: Any) -> None:
        """Give the caller a float32 array of latents."""
        self._emit("latent", latents, lambda value: LatentChunk(value, metadata=metadata))

    def emit_progress(
        self, step: int, steps: int, preview: bytes | Awaitable[bytes] = b"", **metadata: Any
    ) -> None:
        """Tell the caller how far an image is, with a PNG of what comes of it; before the image."""
        self._emit(
            "image", preview, lambda value: ProgressChunk(step, steps, value, metadata=metadata)
        )

    def _emit(self, modality: str, value: Any, make: Callable[[Any], Event]) -> None:
        line = self._lines.get(modality)
        if line is None:
            line = self._lines[modality] = _Line(self)
        place = _Place(line, make)
        if not inspect.isawaitable(value):
            place.event = make(value)
            line.places.append(place)
            line.flush()
            return
        line.places.append(place)
        try:
            place.begun = start(self._runtime, value, place)
        except BaseException:
            line.places.remove(place)
            raise

    @property
    def is_over(self) -> bool:
        """Whether it has ended: `state` is `"completed"`, `"stopped"` or `"failed"` then."""
        return self.state not in ("queued", "running")

    # -- for the engine, on its thread ---------------------------------------------------------

    def begin(self, runtime: Runtime, walk: Callable[[Request], Any]) -> None:
        """Start walking."""
        self.state = "running"
        self._runtime = runtime
        self._task = runtime.spawn(walk(self), waiter=self)

    def arm(self, runtime: Runtime) -> None:
        """Start the clock of the deadline."""
        if self._deadline is not None:
            limit = self._deadline - self.submitted
            late = RequestTimeout(f"request {self.id} was not done within {limit:.3g} s")
            left = self._deadline - time.monotonic()
            self._timer = runtime.call_later(left, lambda: self.stop(late))

    def resolve(self, reason: str | None) -> None:
        """The walk returned; the request ends once all that it emitted is delivered."""
        self._reason = reason or "stop"
        self._task = None
        self.settle()

    def reject(self, error: BaseException) -> None:
        """The walk raised."""
        self._task = None
        self.stop(error)

    def settle(self) -> None:
        """End if the walk has ended and nothing is still to be delivered."""
        if self._reason is None or any(line.places for line in self._lines.values()):
            return
        if self.is_over:
            return
        self.usage.total_time = time.monotonic() - self.submitted
        closing = {"finish_reason": self._reason, "usage": self.usage}
        if "audio" in self.output_modalities and self._sample_rate is not None:
            empty = np.zeros(0, dtype=np.int16)
            self.sink.event(AudioChunk(empty, self._sample_rate, **closing))
        else:
            self.sink.event(TextChunk("", **closing))
        self._end("completed", None)

    def stop(self, error: BaseException) -> None:
        """End now, whatever is going on; the caller gets `error`."""
        if self.is_over:
            return
        if self._task is not None:
            self._task.withdraw()
            self._task = None
        for line in self._lines.values():
            line.withdraw()
        self.usage.total_time = time.monotonic() - self.submitted
        if not isinstance(error, MStarError):
            failure = RequestFailed(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            error = failure
        self._end("stopped" if isinstance(error, RequestStopped) else "failed", error)

    def deliver(self, event: Event) -> None:
        """Hand one event to the caller."""
        if self.usage.time_to_first_event is None:
            self.usage.time_to_first_event = time.monotonic() - self.submitted
        if isinstance(event, AudioChunk):
            self.usage.audio_seconds += len(event.pcm) / event.sample_rate
        self.sink.event(event)

    def _end(self, state: str, error: BaseException | None) -> None:
        was, self.state = self.state, state
        self._lines = {}  # they hold the request
        if self._timer is not None:
            self._timer.cancel()
        self.on_end(self, was)
        self.sink.end(error, self.usage)


class _Line:
    """The output of one modality, delivered in the order in which it was emitted."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.places: deque[_Place] = deque()

    def flush(self) -> None:
        request = self.request
        while self.places and self.places[0].event is not None:
            request.deliver(self.places.popleft().event)
        request.settle()

    def withdraw(self) -> None:
        places, self.places = self.places, deque()
        for place in places:
            if place.event is None and place.begun is not None:
                place.begun.withdraw()


class _Place:
    """One place in a line: a value that is or will be there."""

    __slots__ = ("begun", "event", "line", "make")

    def __init__(self, line: _Line, make: Callable[[Any], Event]) -> None:
        self.line = line
        self.make = make
        self.event: Event | None = None
        self.begun: Trap | Task | None = None

    def resolve(self, value: Any) -> None:
        self.begun = None  # it holds this place
        try:
            self.event = self.make(value)
            self.line.flush()
        except Exception as error:
            self.line.request.stop(error)

    def reject(self, error: BaseException) -> None:
        self.line.request.stop(error)
