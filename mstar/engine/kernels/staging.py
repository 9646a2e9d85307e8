"""What the host tells the device in each step, without waiting for it.

A copy from ordinary memory makes the host wait until everything before it on the stream has run,
and with that there is no look-ahead. From pinned memory it is only put on the stream.

The pinned memory is let go of as soon as the copy is on the stream, before it has run. That is
safe: it belongs to torch's caching host allocator, which notes every asynchronous copy from its
blocks with an event on the copy's stream and gives a block out again only when its events have
passed. So nobody has to keep buffers, count steps or wait. The tensor on the device is made and
used on the current stream, as any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["block_table", "pack", "send", "to_device", "to_host"]

_NUMPY = {
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
}
_ALIGNMENT = 16  # bytes; Triton compiles another kernel for pointers that are not multiples of it


def to_device(
    values: Sequence[float] | np.ndarray, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`torch.tensor(values, dtype, device)` of a flat list, but the host never waits.

    Args:
        dtype: int32, int64, float32 or float64.
    """
    return send(torch.from_numpy(np.array(values, dtype=_NUMPY[dtype])), device)


def pack(
    parts: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Flat lists, each as `to_device` gives it, in a single copy. They share one tensor."""
    unit = _ALIGNMENT // dtype.itemsize
    starts, size = [], 0
    for part in parts:
        starts.append(size)
        size += -(-len(part) // unit) * unit
    buffer = np.zeros(size, dtype=_NUMPY[dtype])
    for start, part in zip(starts, parts, strict=True):
        buffer[start : start + len(part)] = part
    sent = send(torch.from_numpy(buffer), device)
    return [sent[s : s + len(part)] for s, part in zip(starts, parts, strict=True)]


def block_table(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """Page numbers int32 `[sequences, width]`, rows as wide as the longest, padded with page 0."""
    width = max(map(len, tables), default=0) or 1
    rows = np.zeros((len(tables), width), dtype=np.int32)
    for row, table in zip(rows, tables, strict=True):
        row[: len(table)] = table
    return rows


def send(host: Tensor, device: torch.device) -> Tensor:
    """On a GPU, a copy that is put on the current stream: it does not wait for what runs there."""
    if device.type == "cpu":  # `to` would hand Python's lock over for nothing
        return host
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """A copy that waits for the current stream alone, and for nothing else on the GPU."""
    if not x.is_cuda:
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return host
