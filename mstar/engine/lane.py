"""A worker thread beside the engine's, for nodes that others need not wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["Lane"]


class Lane:
    """Runs jobs one after another in a thread that starts with the first one.

    Args:
        context: a context manager that the thread runs inside (device stream, inference mode).
    """

    def __init__(self, name: str, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._context = context
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` when those before it are done. It must not raise."""
        self._jobs.put(job)

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        with self._context():
            while (job := self._jobs.get()) is not None:
                job()
                del job  # and with it the batch, which may lie on a GPU
