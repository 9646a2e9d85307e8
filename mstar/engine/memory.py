"""How much memory there is, and whether an error means that there was too little."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from mstar.engine.captured import graph_bytes
from mstar.engine.feature_cache import FeatureCache
from mstar.engine.kvcache import KVLayout
from mstar.engine.node import Node

__all__ = ["free_bytes", "is_out_of_memory", "kv_tokens_for", "memory_stats"]


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


def memory_stats(
    device: torch.device,
    networks: Iterable[nn.Module],
    nodes: Iterable[Node],
    features: FeatureCache | None,
) -> dict[str, int]:
    """Bytes by what they hold.

    Returns:
        `weights`, `kv_cache`, `features` (encoded media that are kept), `graphs` (what captured
        steps keep for their intermediate results) and `workspace`, both 0 on a CPU. On a GPU they
        add up to `reserved`, which is all that torch has taken there for this process: graphs are
        those of the process, and `workspace` is the rest, temporary memory that is kept for the
        next step and whatever else the process does there. `free` is what nobody has taken.
    """
    weights = [x for net in networks for x in (*net.parameters(), *net.buffers())]
    pools = [node.pool.tensor for node in nodes if getattr(node, "pool", None) is not None]
    stats = {
        "weights": _bytes(weights),
        "kv_cache": _bytes(pools),
        "features": 0 if features is None else features.bytes,
        "graphs": 0,
        "workspace": 0,
    }
    if device.type == "cuda":
        stats["graphs"], reserved = graph_bytes(device), torch.cuda.memory_reserved(device)
        stats["workspace"] = reserved - sum(stats.values())
        stats.update(reserved=reserved, free=free_bytes(device))
    return stats


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their memory; what several share counts once."""
    storages = (x.untyped_storage() for x in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
