"""Actions that were asked for, and those that came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mstar.errors import DeadlineExceeded, RequestTimeout

__all__ = ["Chunk", "Pending"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Actions in both forms.

    Args:
        original: as the model makes them, normalised, float32 `[horizon, policy's action_dim]`.
        actions: as the robot takes them, float32 `[horizon, robot's action_dim]`; None if the
            checkpoint has no statistics.
        state: that they were inferred from, in robot units, as the policy knows it, `[dims]`.
        infer_ms: what the engine took.
    """

    original: np.ndarray
    actions: np.ndarray | None
    state: np.ndarray
    infer_ms: float


class Pending:
    """A chunk on its way; of `RobotPolicy.begin`.

    Args:
        for_robot: `RobotPolicy.for_robot`.
        handle: of the engine's request.
        state: see `Chunk`.
        deadline_ms: counted from `began`; None for none.
        began: in seconds of `time.monotonic`.
    """

    def __init__(
        self,
        for_robot: Callable[[np.ndarray, np.ndarray], np.ndarray | None],
        handle: Any,
        state: np.ndarray,
        deadline_ms: float | None,
        began: float,
    ) -> None:
        self._for_robot, self._handle, self._state = for_robot, handle, state
        self._deadline_ms, self._began = deadline_ms, began
        self._queued = time.perf_counter()

    def result(self) -> Chunk:
        """Wait for it. If that ends early, for whatever reason, the engine is free again.

        Raises:
            DeadlineExceeded: it is not there in time.
            MStarError: it failed or was cancelled.
        """
        limit, left = self._deadline_ms, None
        if limit is not None:
            left = max(0.0, self._began + limit / 1e3 - time.monotonic())
        try:
            original = self._handle.result(left).actions
        except RequestTimeout:  # of the request's own `timeout`
            raise
        except TimeoutError:
            raise DeadlineExceeded(f"no actions within {limit:g} ms") from None
        finally:
            self.cancel()
        infer_ms = 1e3 * (time.perf_counter() - self._queued)
        actions = self._for_robot(original, self._state)
        return Chunk(original, actions, self._state, infer_ms)

    def cancel(self) -> None:
        """Give it up. Does nothing if it is there."""
        if not self._handle.done:
            self._handle.cancel()
