"""Figures for Prometheus: what HTTP sees, and what the engine counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mstar.errors import MStarError
from mstar.types import Usage

__all__ = ["Metrics"]

_UP = "mstar_up", "Whether the engine serves."
_METHODS = ("GET", "HEAD", "POST", "OPTIONS")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1)
_FACTORS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 5, 10)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """A registry of its own, so that several apps fit into one process."""

    def __init__(self, engine: Any) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self._served = Counter(
            "mstar_http_requests",
            "HTTP requests answered; status 499: the client left first.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self._seconds = self._histogram("http_request_seconds", "Whole request.", _SECONDS, "route")
        self._first = self._histogram("time_to_first_event_seconds", "First event.", _SECONDS)
        self._audio = self._histogram("time_to_first_audio_seconds", "First audio.", _SECONDS)
        self._token = self._histogram(
            "inter_token_seconds",
            "Mean time between the tokens of a request, after its first event.",
            _TOKEN_SECONDS,
        )
        self._factor = self._histogram(
            "real_time_factor", "Time to make audio / its playing time.", _FACTORS
        )

    def _histogram(
        self, name: str, help: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"mstar_{name}", help, labels, buckets=buckets, registry=self.registry)

    def served(self, route: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request is done."""
        method = method if method in _METHODS else "other"
        self._served.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def request(self, first: float | None, audio: float | None, usage: Usage | None) -> None:
        """A request of the engine has ended."""
        if first is not None:
            self._first.observe(first)
        if audio is not None:
            self._audio.observe(audio)
        if usage is None or not usage.total_time:
            return
        if usage.generated_tokens > 1 and usage.time_to_first_event is not None:
            rest = usage.total_time - usage.time_to_first_event
            self._token.observe(rest / (usage.generated_tokens - 1))
        if usage.audio_seconds:
            self._factor.observe(usage.total_time / usage.audio_seconds)

    def page(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads `engine.stats()` when somebody asks; nothing but `mstar_up 0` of a dead engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._engine.stats()
        except MStarError:
            yield GaugeMetricFamily(*_UP, value=0)
            return
        yield GaugeMetricFamily(*_UP, value=1)
        requests, tokens = dict(stats["requests"]), dict(stats["tokens"])
        for state, where in (("running", "that run"), ("waiting", "in the queue")):
            name, help = f"mstar_requests_{state}", f"Requests {where}."
            yield GaugeMetricFamily(name, help, value=requests.pop(state))
        seconds = tokens.pop("audio_seconds", 0.0)
        yield CounterMetricFamily("mstar_audio_seconds", "Seconds of audio made.", value=seconds)
        help = "Requests that ended, by outcome."
        ended = CounterMetricFamily("mstar_requests", help, labels=["outcome"])
        help = "Tokens of ended requests, by kind."
        counted = CounterMetricFamily("mstar_tokens", help, labels=["kind"])
        for outcome, count in requests.items():
            ended.add_metric([outcome], count)
        for kind, count in tokens.items():
            counted.add_metric([kind.removesuffix("_tokens")], count)
        yield from (ended, counted, *_of_nodes(stats["nodes"]))


def _of_nodes(nodes: dict[str, Any]) -> Iterator[Metric]:
    own = ["node"]
    waiting = GaugeMetricFamily("mstar_node_waiting", "Calls that wait for a node.", labels=own)
    batches = HistogramMetricFamily("mstar_batch_size", "Calls per batch.", labels=own)
    pages = GaugeMetricFamily("mstar_kv_pages", "KV cache pages.", labels=[*own, "state"])
    help = "Requests that gave up their pages."
    preempted = CounterMetricFamily("mstar_preemptions", help, labels=own)
    for name, node in nodes.items():
        waiting.add_metric([name], node["waiting"])
        sizes = node["batch_sizes"].items()
        buckets = [
            (str(float(top)), sum(count for size, count in sizes if size <= top))
            for top in _BATCHES
        ]
        batches.add_metric([name], [*buckets, ("+Inf", node["batches"])], node["calls"])
        if "pages" in node:
            for state in ("used", "free", "cached", "total"):
                pages.add_metric([name, state], node["pages"][state])
            preempted.add_metric([name], node["pages"]["preemptions"])
    yield from (waiting, batches, pages, preempted)
