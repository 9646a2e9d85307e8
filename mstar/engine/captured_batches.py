"""Batches of rows as captured steps, for nodes that run beside the engine's thread.

What is replayed was captured in a warm-up: batches of a power of two of rows. Smaller batches are
padded with whatever rows were there before. Everything else runs as it is, so nothing is captured
once requests are served.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from mstar.engine.captured import Captured, Outputs, Record, Step
from mstar.engine.kernels.dispatch import next_power_of_2

__all__ = ["CapturedBatches"]


class CapturedBatches:
    """Runs steps whose inputs and outputs have a row for every item of a batch, `[rows, ...]`; no
    row may depend on another. May be used from any thread.

    Args:
        record: how to capture (see `engine.captured`), for nothing else; None to run every batch
            as it is.
    """

    def __init__(self, record: Record | None) -> None:
        self._record = record
        self._captured: dict[Hashable, Captured] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Batches that were captured."""
        return len(self._captured)

    def capture(self, step: Step, *row: Tensor, most: int, key: Hashable = None) -> None:
        """Capture batches of up to `most` rows, the largest first: others reuse its memory.

        Args:
            row: inputs of one row, `[1, ...]`, on the device.
            key: all that the step depends on beside the form of its inputs.
        """
        size = next_power_of_2(most) if self._record is not None else 0
        while size:
            bucket = _bucket(row, size, key)
            with self._lock:
                if bucket not in self._captured:
                    own = [x.repeat(size, *(1 for _ in x.shape[1:])) for x in row]
                    self._captured[bucket] = Captured(self._record, step, own)
            size //= 2

    @contextmanager
    def run(self, step: Step, *inputs: Tensor, key: Hashable = None) -> Iterator[Outputs]:
        """`step(*inputs)`, replayed where such a batch was captured.

        Outputs are valid inside the `with`, and another thread may replay on a stream of its own
        right after it: what reads them must have run by then (`to_host` waits for it).
        """
        count = len(inputs[0])
        found = self._captured.get(_bucket(inputs, next_power_of_2(count), key))
        if found is None:
            yield step(*inputs)
            return
        with self._lock:
            for mine, given in zip(found.inputs, inputs, strict=True):
                mine[:count].copy_(given, non_blocking=True)
            found.replay()
            yield tuple(x[:count] for x in found.outputs)


def _bucket(inputs: Sequence[Tensor], size: int, key: Hashable) -> Hashable:
    return key, size, *((x.shape[1:], x.dtype) for x in inputs)
