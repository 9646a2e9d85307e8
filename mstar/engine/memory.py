"""How much memory there is, and whether an error means that there was too little."""

from __future__ import annotations

from pathlib import Path

import torch

from mstar.engine.kvcache import KVLayout

__all__ = ["free_bytes", "is_out_of_memory", "kv_tokens_for"]


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return int(sizes["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):  # not Linux
        return 4 << 30


def kv_tokens_for(
    layout: KVLayout,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fraction: float,
    at_most: int,
) -> int:
    """Tokens of KV cache that fit into a share of the free memory, but not more than is of use.

    On a CPU a quarter of that share is taken: the memory is the caller's, too.
    """
    share = free_bytes(device) * fraction * (1.0 if device.type == "cuda" else 0.25)
    return max(1024, min(at_most, int(share / layout.bytes_per_token(dtype))))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might succeed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
