"""What the engine counts."""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import Any

from mstar.engine.kvcache import KVPool
from mstar.engine.node import Node
from mstar.engine.request import Request

__all__ = ["Recorder", "node_stats", "pool_stats"]

_KEPT = 2048
_QUANTILES = (0.5, 0.9, 0.99)


class Recorder:
    """Sums over ended requests, and the latencies of the last 2,048 of them."""

    def __init__(self) -> None:
        self.rejected = 0
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._first: deque[float] = deque(maxlen=_KEPT)
        self._total: deque[float] = deque(maxlen=_KEPT)

    def record(self, request: Request) -> None:
        """A request has ended."""
        usage = request.usage
        with self._lock:
            self._outcomes[request.state] += 1
            for name in ("prompt_tokens", "cached_tokens", "generated_tokens"):
                self._tokens[name] += getattr(usage, name)
            self._tokens["audio_seconds"] += usage.audio_seconds
            if usage.time_to_first_event is not None:
                self._first.append(usage.time_to_first_event)
            self._total.append(usage.total_time or 0.0)

    def requests(self) -> dict[str, int]:
        """Ended requests by outcome."""
        with self._lock:
            ended = {name: self._outcomes[name] for name in ("completed", "failed", "stopped")}
        return {**ended, "rejected": self.rejected}

    def tokens(self) -> dict[str, float]:
        """Tokens and seconds of audio of ended requests."""
        with self._lock:
            return dict(self._tokens)

    def latency(self) -> dict[str, dict[str, float]]:
        """Quantiles in seconds of the time to the first event and of the whole request."""
        with self._lock:
            series = {
                "time_to_first_event": sorted(self._first),
                "total_time": sorted(self._total),
            }
        return {name: _quantiles(values) for name, values in series.items()}


def node_stats(node: Node) -> dict[str, Any]:
    """Batches of one node, and its KV cache if it has one."""
    sizes = dict(sorted(node.batch_sizes.copy().items()))
    stats: dict[str, Any] = {
        "waiting": node.waiting,
        "batches": sum(sizes.values()),
        "calls": sum(size * count for size, count in sizes.items()),
        "batch_sizes": sizes,
    }
    pool = getattr(node, "pool", None)
    if pool is not None:
        stats["pages"] = pool_stats(pool)
    return stats


def pool_stats(pool: KVPool) -> dict[str, int]:
    """Pages of a KV cache by state, prefix hits, preemptions."""
    table = pool.table
    return {
        "total": table.count,
        "used": table.used,
        "free": table.free,
        "cached": table.cached,
        "page_size": pool.page_size,
        "prefix_hits": table.hits,
        "evictions": table.evictions,
        "preemptions": pool.preemptions,
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    last = len(values) - 1
    return {f"p{round(q * 100)}": values[round(q * last)] for q in _QUANTILES}
