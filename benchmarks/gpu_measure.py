"""Times on a device, and what it can do at most; on a CPU only so that the rest can be tried."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["Clock", "ceilings", "idle", "idle_during", "norm_error"]

_FLUSH = 1 << 28  # bytes, more than any cache
_WARM, _BUDGET, _MOST = 3, 0.15, 200


class Clock:
    """Median times of calls with cold caches.

    On a GPU a call is captured as a graph, so that gaps between its launches do not count, and
    timed by events.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._dirt = torch.empty(_FLUSH if self.on_gpu else 0, dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], object], *, capture: bool = True) -> float:
        """The median time of a call; one that waits for the device cannot be captured."""
        if not self.on_gpu:
            call()
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        run = self._captured(call) if capture else call
        for _ in range(_WARM):
            run()
        once = self._times(run, 3)
        count = min(_MOST, max(5, int(_BUDGET / max(statistics.median(once), 1e-6))))
        return statistics.median(self._times(run, count))

    def _times(self, run: Callable[[], object], count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            self._dirt.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1000 for begin, end in events]

    def _captured(self, call: Callable[[], object]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                call()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def ceilings(clock: Clock, *, tiny: bool = False) -> dict[str, float]:
    """Bytes per second of a large copy, read and written, and FLOPs per second of a large product
    of bfloat16 matrices of random numbers (of zeros it would be faster)."""
    size, side = (1 << 20, 128) if tiny else (1 << 30, 8192)
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, dtype=torch.bfloat16, device=clock.device)
    out = torch.empty_like(a)
    return {
        "bytes_per_s": 2 * size / clock.seconds(lambda: target.copy_(source)),
        "flops_per_s": 2 * side**3 / clock.seconds(lambda: torch.mm(a, b, out=out)),
    }


def idle_during(run: Callable[[], object]) -> dict[str, object]:
    """What the GPU does not do during a call, see `idle`; why that cannot be told, where a profiler
    is not allowed. Graphs count by what is in them."""
    try:
        on_gpu = torch.cuda.is_available()
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as found:
            run()
            if on_gpu:
                torch.cuda.synchronize()
        events = found.profiler.kineto_results.events()
        busy = [e for e in events if str(e.device_type()).endswith("CUDA")]
        return idle((e.start_ns(), e.start_ns() + e.duration_ns()) for e in busy)
    except Exception as error:
        return {"gpu_idle": f"{type(error).__name__}: {error}"[:300]}


def idle(busy: Iterable[tuple[int, int]], longest: int = 10_000) -> dict[str, float]:
    """Shares of the time between the first tenth and the last one of what a GPU did in which it did
    nothing: in all, and in gaps of more than `longest` ns, in which it waits for the host."""
    spans = sorted(busy)
    tenth = len(spans) // 10
    spans = spans[tenth : len(spans) - tenth]
    if not spans:
        return {}
    begin, end = spans[0]
    gaps = []
    for start, stop in spans:
        if start > end:
            gaps.append(start - end)
        end = max(end, stop)
    whole = max(end - begin, 1)
    waits = sum(gap for gap in gaps if gap > longest)
    return {"gpu_idle": sum(gaps) / whole, "gpu_waits": waits / whole}


def norm_error(found: object, expected: object) -> float:
    """The largest |found - expected| / |expected| (Euclidean) of the tensors of two results."""
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    errors = [float((f - e).norm() / e.norm().clamp(min=1e-30)) for f, e in pairs]
    return max(error if error == error else float("inf") for error in errors)


def _tensors(result: object) -> list[Tensor]:
    each = [result] if isinstance(result, Tensor) else list(result)
    return [x.double().flatten() for x in each]
