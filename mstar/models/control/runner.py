"""A policy in a control loop: inference on a thread of its own, actions at the robot's rate."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from mstar.errors import DeadlineExceeded
from mstar.models.control.action_queue import ActionQueue, delay_steps
from mstar.models.control.pending import Chunk, Pending
from mstar.models.parameters import demand, plain, positive

__all__ = ["Policy", "PolicyRunner"]

_KEPT = 4096  # latencies
_RECENT = 100  # latencies, the longest of which the next one is expected to be
_OURS = ("raw", "prev_chunk_left_over", "inference_delay", "rtc_mode")
_COUNTS = (
    "observations",
    "inferences",
    "chunks",
    "actions",
    "starvations",
    "deadline_misses",
    "stale_chunks",
    "failures",
)


class Policy(Protocol):
    """What a runner asks of a policy; one with real-time chunking has `previous`, too."""

    config: Any  # chunk_size, n_action_steps, rtc, rtc_training_max_delay
    robot: Any  # run: how many actions of a chunk are executed, if it says so

    def begin(self, obs: Mapping[str, Any], **params: Any) -> Pending:
        """Queue an observation."""

    def reset(self) -> None:
        """Forget what was before: another episode begins."""


class PolicyRunner:
    """Keeps a queue of actions filled. No lock is held while the policy infers.

        with PolicyRunner(policy, fps=50, execution_horizon=10, rtc=True) as runner:
            while True:
                runner.notify(robot.observe())
                if (action := runner.get_action()) is not None:
                    robot.move(action)

    An observation is used at most once: where none comes, the queue runs dry, and the robot stops.
    A runner that is closed, or that nobody holds any more, ends its thread.

    Args:
        policy: of `Engine.policy`.
        fps: control steps per second, at which `get_action` is called.
        execution_horizon: with real-time chunking, the rows of a chunk that are held to the one
            before it, by default as many as the checkpoint says, 10 as published, but at most
            60 % of a chunk; without it, the rows of a chunk that are executed, by default as many
            as the robot's published client does.
        rtc: real-time chunking: `"guided"`, `"trained"`, True for what the checkpoint was trained
            for, or None for one chunk after the other.
        queue_threshold: rows that are left when the next inference begins. By default 30 with
            real-time chunking, or 60 % of a shorter chunk; half of what is executed without it.
        deadline_ms: an inference that takes longer is given up for the next observation.
        literal: what lerobot does: skip as many rows as the measured latency says, even where the
            robot did not get that far; count the latency of the first inference, which is cold;
            lengthen what is left of a chunk with zeros, and not with its last row.
        clock: seconds, for measuring.
        **params: of the model, for every call: `num_steps`, `prefix_attention_schedule` ...

    Raises:
        InvalidRequest: an argument does not fit the policy.
    """

    def __init__(
        self,
        policy: Policy,
        fps: float,
        execution_horizon: int | None = None,
        rtc: str | bool | None = None,
        *,
        queue_threshold: int | None = None,
        deadline_ms: float | None = None,
        literal: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        **params: Any,
    ) -> None:
        self.policy, self.fps = policy, positive("fps", fps, 1e4)
        self._horizon = policy.config.chunk_size
        self.rtc = self._mode(rtc)
        most, part = self._horizon, self._horizon * 3 // 5
        usual = policy.config.rtc["execution_horizon"]
        rows = min(usual, part) if self.rtc else policy.robot.run or policy.config.n_action_steps
        rows = max(1, min(rows, most))
        self.execution_horizon = _rows("execution_horizon", execution_horizon, 1, most, rows)
        rows = min(30, part) if self.rtc else self.execution_horizon // 2
        self.queue_threshold = _rows("queue_threshold", queue_threshold, 0, most, rows)
        if deadline_ms is not None:
            deadline_ms = positive("deadline_ms", deadline_ms, 1e9)
        for name, value in params.items():
            demand(name not in _OURS, name, value, "is up to the runner; see rtc")
        self.deadline_ms = deadline_ms
        self._literal, self._clock, self._params = literal, clock, params
        self._queue = ActionQueue(rtc=self.rtc is not None, literal=literal)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._seconds: deque[float] = deque(maxlen=_KEPT)
        self._longest = 0.0
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._lock = threading.Lock()  # of what follows; never held for longer than a few lines
        self._latest: Mapping[str, Any] | None = None
        self._episode = 0
        self._state: np.ndarray | None = None  # that the current chunk was inferred from
        self._pending: Pending | None = None
        self._failure: BaseException | None = None
        self._trace: TracebackType | None = None
        self._closed = False
        self._wake = threading.Event()
        self._thread = threading.Thread(
            target=_work, args=(weakref.ref(self), self._wake), name="mstar-runner", daemon=True
        )
        weakref.finalize(self, self._wake.set)
        self._thread.start()

    # -- from the control loop ---------------------------------------------------------------

    def notify(self, obs: Mapping[str, Any]) -> None:
        """There is a new observation; one that waits is forgotten.

        It is not copied: its arrays must not be written to any more.
        """
        with self._lock:
            self._counts["observations"] += 1
            self._latest = obs
        self._wake.set()

    def get_action(self) -> np.ndarray | None:
        """The next action, `[action_dim]`, or None if there is none yet, or no more since the
        runner was closed. Never waits.

        Raises:
            Exception: what inference failed with. There are no more actions until `reset`.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure.with_traceback(self._trace)
            action = self._queue.get()
            if action is not None:
                self._counts["actions"] += 1
            elif self._state is not None:
                self._counts["starvations"] += 1
        self._wake.set()
        return action

    def reset(self) -> None:
        """A new episode: forget actions, the observation, a failure, and a chunk on its way, also
        if it should arrive later."""
        self._forget()
        self.policy.reset()

    @property
    def stats(self) -> dict[str, Any]:
        """Counts since the start, and the latency in milliseconds of inferences but for the first.

        `starvations` are calls of `get_action` in the middle of an episode that got nothing;
        `stale_chunks` came after a `reset`, or when all their rows were over.
        """
        with self._lock:
            seconds, longest = list(self._seconds), self._longest
            counts = dict(self._counts)
        found: dict[str, float | None] = dict.fromkeys(("p50", "p95", "p99", "max"))
        if seconds:
            quantiles = 1e3 * np.percentile(seconds, [50, 95, 99])
            found = dict(zip(found, [*map(float, quantiles), 1e3 * longest], strict=True))
        return {"latency_ms": found, **counts}

    def close(self) -> None:
        """End the thread, and the actions. May be called twice."""
        self._closed = True
        self._forget()
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _forget(self) -> None:
        with self._lock:
            self._episode += 1
            self._queue.clear()
            self._latest = self._state = self._failure = self._trace = None
            pending = self._pending
        if pending is not None:
            pending.cancel()

    def __enter__(self) -> PolicyRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- on the thread -----------------------------------------------------------------------

    def _round(self) -> bool:
        """Infer if there is reason to; False at the end."""
        with self._lock:
            if self._closed:
                return False
            busy = self._failure is not None or len(self._queue) > self.queue_threshold
            if busy or self._latest is None:
                return True
            obs, self._latest = self._latest, None
            episode, index, state = self._episode, self._queue.index, self._state
            left = self._queue.left_over()
        self._infer(obs, episode, index, None if left is None else left[0], state)
        self._wake.set()  # there may be an observation already
        return True

    def _infer(
        self,
        obs: Mapping[str, Any],
        episode: int,
        index: int,
        left: np.ndarray | None,
        state: np.ndarray | None,
    ) -> None:
        began = self._clock()
        try:
            steered = self._steered(obs, left, state)
            pending = self.policy.begin(
                obs, deadline_ms=self.deadline_ms, **{**self._params, **steered}
            )
            with self._lock:
                self._pending = pending
                over = self._episode != episode
            if over:
                pending.cancel()
            self._take(pending.result(), self._clock() - began, episode, index)
        except BaseException as error:
            with self._lock:
                if self._episode != episode:
                    self._counts["stale_chunks"] += 1
                elif isinstance(error, DeadlineExceeded):
                    self._counts["deadline_misses"] += 1
                else:
                    self._counts["failures"] += 1
                    self._failure, self._trace = error, error.__traceback__
                    self._queue.clear()
        finally:
            with self._lock:
                self._pending = None
                self._counts["inferences"] += 1

    def _take(self, chunk: Chunk, seconds: float, episode: int, index: int) -> None:
        original, actions = chunk.original, chunk.actions
        if self.rtc is None:
            original, actions = (rows[: self.execution_horizon] for rows in (original, actions))
        with self._lock:
            warm = self._counts["inferences"] > 0
            if warm:
                self._seconds.append(seconds)
                self._longest = max(self._longest, seconds)
            if warm or self._literal:
                self._recent.append(seconds)
            if self._episode != episode:
                self._counts["stale_chunks"] += 1
                return
            # Before the first chunk the robot does not move: none of its rows is over.
            late = self._literal or self._state is not None
            skipped = self._queue.merge(
                original, actions, delay_steps(seconds, self.fps) if late else 0, index
            )
            self._counts["chunks"] += 1
            self._counts["stale_chunks"] += skipped == len(original)
            self._state = chunk.state

    def _steered(
        self, obs: Mapping[str, Any], left: np.ndarray | None, state: np.ndarray | None
    ) -> dict[str, Any]:
        """Parameters of real-time chunking, where there is something to go on from."""
        if self.rtc is None or left is None or not len(left):
            return {}
        delay = delay_steps(max(self._recent, default=0.0), self.fps)
        delay = min(delay, self.execution_horizon, self._horizon - 1)
        if self.rtc == "trained":
            delay = min(delay, self.policy.config.rtc_training_max_delay)
        rows = self.execution_horizon
        there = min(len(left), rows) if self._literal else rows
        previous = self.policy.previous(left, state, obs, there)
        return {
            "prev_chunk_left_over": np.pad(previous, ((0, rows - there), (0, 0))),
            "inference_delay": delay,
            "execution_horizon": self.execution_horizon,
            "rtc_mode": self.rtc,
        }

    def _mode(self, rtc: str | bool | None) -> str | None:
        most = self.policy.config.rtc_training_max_delay
        if rtc is None or rtc is False:
            return None
        able = hasattr(self.policy, "previous")
        demand(able, "rtc", rtc, "the policy makes every chunk anew: must be None")
        if rtc is True:
            return "trained" if most else "guided"
        fits = isinstance(rtc, str) and rtc in ("guided", "trained")
        demand(fits, "rtc", rtc, "must be guided, trained, True or None")
        demand(rtc == "guided" or most > 0, "rtc", rtc, "the policy was not trained for it")
        return rtc


def _work(runner: weakref.ref[PolicyRunner], wake: threading.Event) -> None:
    """What the thread does. While it waits, it does not hold the runner."""
    while True:
        wake.wait()
        wake.clear()
        alive = runner()
        if alive is None or not alive._round():
            return
        del alive


def _rows(field: str, value: int | None, low: int, high: int, usual: int) -> int:
    if value is None:
        return usual
    value = plain(value)
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    demand(fits, field, value, f"must be from {low} to {high}")
    return value
