"""Steps captured as CUDA graphs, one per bucket, replayed with no Python in between.

A step is a function of tensors that returns a tuple of tensors. It is captured over input tensors
of its own: a call copies what it is given into them, replays, and reads the outputs where the
capture left them. What may be captured must, for one bucket,

- compute nothing on the host from a tensor's value (`.item()`, `.tolist()`, an `if` on a tensor,
  shapes that follow from values) and wait for nothing; launches and allocations are what is
  recorded, with the shapes and Python numbers of the first call;
- read, beside its inputs, only tensors that stay where they are (weights, tables, a KV pool), and
  keep no tensor that it makes but by returning it;
- draw no random numbers, and be repeatable: a capture runs it two times more, on the inputs of the
  first call.

Buckets share the memory of what lies between inputs and outputs, so they belong to one thread and
one stream, and what one of them returned is valid until any of them runs again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

__all__ = ["Captured", "CapturedSteps", "Outputs", "Record", "Step", "graph_bytes", "record"]

_one_at_a_time = threading.RLock()  # captures of a process; engines have threads of their own
_alive: weakref.WeakSet[_Graphs] = weakref.WeakSet()
_alive_lock = threading.Lock()

Outputs = tuple[Tensor, ...]
Step = Callable[..., Outputs]
Record = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]


def record() -> Record:
    """What captures steps as CUDA graphs that share their memory.

    It takes a step and returns how to run it again, and the tensors it writes its outputs to.
    """
    return _Graphs()


class _Graphs:
    """See `record`.

    Attributes:
        device: index of the GPU; None before the first capture.
        bytes: of memory that was reserved in captures, and is until the graphs are gone.
    """

    def __init__(self) -> None:
        self.device: int | None = None
        self.bytes = 0
        self._memory = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None
        with _alive_lock:
            _alive.add(self)

    def __call__(self, step: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        if self._stream is None:  # of the device that is current now; torch has but 32 of them
            self._stream, self.device = torch.cuda.Stream(), torch.cuda.current_device()
        stream = self._stream
        with _one_at_a_time:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Only this thread is bound by what may happen during a capture: others go on working.
            how = {"stream": stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, pool=self._memory, **how):
                before = torch.cuda.memory_reserved()  # its beginning has emptied caches
                outputs = step()
                self.bytes += max(0, torch.cuda.memory_reserved() - before)
        return graph.replay, outputs


def graph_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process' graphs keep for what lies between inputs and outputs.

    It is how much more was reserved while they were captured, so it includes what other threads
    reserved meanwhile.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with _alive_lock:
        return sum(graphs.bytes for graphs in _alive if graphs.device == index)


class Captured:
    """One bucket of a step.

    Args:
        step: see the module. It is kept, and with it the tensors that it holds: replays read them.
        inputs: what it will read on every replay, on the device; made outside of any capture.
    """

    def __init__(self, record: Record, step: Step, inputs: Sequence[Tensor]) -> None:
        self.step, self.inputs = step, tuple(inputs)
        self.replay, self.outputs = record(lambda: step(*self.inputs))


class CapturedSteps:
    """Steps by bucket, each captured when it is first run.

    Args:
        record: how to capture (see `record`); None to run every step as it is.
        device: where steps run; inputs are copied to it.
        most: buckets that are kept; steps of further ones run as they are.
    """

    def __init__(self, record: Record | None, device: torch.device, most: int = 64) -> None:
        self._record, self._device, self._most = record, device, most
        self._buckets: dict[Hashable, Captured] = {}

    def __len__(self) -> int:
        """Buckets that were captured."""
        return len(self._buckets)

    def run(self, step: Step, *inputs: Tensor, key: Hashable = None) -> Outputs:
        """`step(*inputs)`, replayed where it was captured.

        A bucket is the key, and the shape and dtype of every input. `step` is what is captured
        where the bucket is new, and ignored otherwise: all else that it depends on must be in
        `key`.

        Returns:
            The outputs, valid until the next run of any bucket.
        """
        if self._record is None:
            return step(*(x.to(self._device) for x in inputs))
        bucket = key, *((x.shape, x.dtype) for x in inputs)
        found = self._buckets.get(bucket)
        if found is None:
            # An input of its own, also where the caller's is on the device already.
            own = [torch.empty_like(x, device=self._device).copy_(x) for x in inputs]
            if len(self._buckets) >= self._most:
                return step(*own)
            found = self._buckets[bucket] = Captured(self._record, step, own)
        else:
            for mine, given in zip(found.inputs, inputs, strict=True):
                mine.copy_(given, non_blocking=True)
        found.replay()
        return found.outputs
