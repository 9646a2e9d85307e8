"""All figures of a run as one object, and that object as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mstar
from mstar.bench.measure import LATENCIES, Figures, figures, meets, percentile
from mstar.bench.run import Run
from mstar.bench.trace import Trace

__all__ = ["advice", "raw", "spread", "summary", "table"]

_LATE = 0.005  # seconds; a tool later than this distorts what it measures
_PER_SLOT = 5
_UNITLESS = ("rtf", "underruns")
_TITLES = {
    "connect": "connect",
    "ttft": "TTFT",
    "itl": "ITL",
    "tpot": "TPOT",
    "first_audio": "first audio",
    "first_image": "first image",
    "e2e": "E2E",
    "rtf": "real-time factor",
    "underruns": "underruns per request",
    "underrun_seconds": "underrun time",
}


def summary(run: Run, slo: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Every figure of the run; times in seconds."""
    traces, plan = run.traces, run.plan
    requests = [figures(trace) for trace in traces if trace.outcome == "done"]
    outcomes = Counter(trace.outcome for trace in traces)
    sources = {f.counted for f in requests if f.tokens}
    source = "mixed" if len(sources) > 1 else "usage" if True in sources else "chunks"
    tokens = {
        "prompt": sum(f.prompt_tokens or 0 for f in requests),
        "generated": sum(f.tokens for f in requests),
        "source": source if sources else None,
    }
    per_second = 1 / run.seconds if run.seconds > 0 else 0.0
    sound = sum(f.audio_seconds for f in requests)
    images = sum(f.images for f in requests)
    found: dict[str, Any] = {
        "mstar": mstar.__version__,
        "url": run.url,
        "route": run.route,
        "model": run.model,
        "load": {
            "concurrency": None if plan.load.rate else plan.load.concurrency,
            "rate": plan.load.rate,
            "requests": plan.load.requests,
            "duration": plan.load.seconds,
            "warmup": plan.warmup,
            "disconnect": plan.disconnect,
            "seed": plan.load.seed,
        },
        "interrupted": run.interrupted,
        "requests": {
            "sent": len(traces),
            "failed": outcomes["failed"],
            "left": outcomes["left"],
            "done": outcomes["done"],
        },
        "failures": _failures(traces),
        "seconds": run.seconds,
        "latency": {name: spread(_all(requests, name)) for name in LATENCIES},
        "underruns": {
            "requests": sum(bool(f.underruns) for f in requests),
            "count": sum(f.underruns or 0 for f in requests),
            "seconds": sum(f.underrun_seconds or 0.0 for f in requests),
        },
        "tokens": tokens,
        "audio_seconds": sound,
        "images": images,
        "throughput": {
            "requests_per_s": len(requests) * per_second,
            "tokens_per_s": tokens["generated"] * per_second,
            "audio_s_per_s": sound * per_second,
            "images_per_s": images * per_second,
        },
        "goodput": _goodput(requests, slo, len(traces) - outcomes["left"], per_second),
        "tool_lag": spread(run.lag),
    }
    found["warnings"] = [*advice(run), *_doubts(found, run)]
    return found


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Number, mean, p50, p90, p99 and maximum; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {
        "count": len(ordered),
        "mean": sum(ordered) / len(ordered),
        **{f"p{q}": percentile(ordered, q) for q in (50, 90, 99)},
        "max": ordered[-1],
    }


def raw(trace: Trace) -> dict[str, Any]:
    """One request, for a line of JSONL. Times of pieces are seconds after `sent`."""
    sent = trace.sent if trace.sent is not None else trace.begun
    made = figures(trace) if trace.outcome == "done" else None
    values = {} if made is None else {n: getattr(made, n) for n in LATENCIES if n != "itl"}
    return {
        "index": trace.index,
        "outcome": trace.outcome,
        "reason": trace.reason,
        "message": trace.message,
        "status": trace.status,
        "finish_reason": trace.finish_reason,
        "begun": trace.begun,
        "sent": trace.sent,
        **values,
        "prompt_tokens": trace.prompt_tokens,
        "tokens": trace.tokens,
        "text": [at - sent for at in trace.text],
        "audio": [[at - sent, seconds] for at, seconds in trace.audio],
        "images": [at - sent for at in trace.images],
        "other": [at - sent for at in trace.other],
    }


def table(found: Mapping[str, Any]) -> str:
    """The summary for people: failures first, then latencies, then throughput."""
    load, counts = found["load"], found["requests"]
    how = f"{load['rate']:g} requests/s" if load["rate"] else f"{load['concurrency']} at a time"
    model = f" {found['model']}" if found["model"] else ""
    sent, seconds = counts["sent"], found["seconds"]
    lines = [
        f"{found['url']} {found['route']}{model}: {sent} requests, {how}, {seconds:.2f} s",
        f"failed {counts['failed']}, left {counts['left']}, done {counts['done']}",
    ]
    for failure in found["failures"]:
        lines.append(f"  {failure['count']} x {failure['reason']}: {failure['example'][:100]}")
    lines += ["", f"{'':24}{'p50':>10}{'p90':>10}{'p99':>10}{'mean':>10}{'n':>9}"]
    for name in LATENCIES:
        values = found["latency"][name]
        if values is not None:
            lines.append(_row(name, values))
    stops = found["underruns"]
    if found["latency"]["underruns"] is not None:
        lines.append(
            f"underruns: {stops['count']} in {stops['requests']} requests, "
            f"{stops['seconds']:.3f} s in all"
        )
    lines += ["", *_throughput(found)]
    lag = found["tool_lag"]
    if lag is not None:
        lines.append(
            f"the tool was late by {1e3 * lag['p50']:.1f} ms (p50), {1e3 * lag['p99']:.1f} (p99)"
        )
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    return "\n".join(lines) + "\n"


def advice(run: Run) -> list[str]:
    """What to change for figures that can be trusted."""
    plan, said = run.plan, []
    slots = plan.load.concurrency if plan.load.rate is None else None
    if slots and len(run.traces) < _PER_SLOT * slots and not run.interrupted:
        said.append(
            f"{len(run.traces)} requests for {slots} at a time: "
            f"{_PER_SLOT * slots} or more give steadier figures"
        )
    if plan.warmup == 0:
        said.append("no warm-up: the first requests may have paid for compilation and caches")
    failed = sum(trace.outcome == "failed" for trace in run.warmup)
    if failed:
        said.append(f"{failed} of {len(run.warmup)} warm-up requests failed")
    if run.interrupted:
        said.append("interrupted: requests under way are not counted")
    return said


def _doubts(found: Mapping[str, Any], run: Run) -> list[str]:
    said = []
    lag = found["tool_lag"]
    if lag is not None and lag["p99"] > _LATE:
        said.append(
            f"the tool itself was late (p99 {1e3 * lag['p99']:.1f} ms): "
            "times may be too long; use fewer streams or a faster machine"
        )
    if found["tokens"]["source"] in ("chunks", "mixed"):
        said.append("the server counts no tokens: pieces of text are counted instead")
    if any(not trace.audio_is_timed for trace in run.traces):
        said.append("the sound is compressed: its length, and so underruns, are not known")
    return said


def _failures(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    failed = [trace for trace in traces if trace.outcome == "failed"]
    examples: dict[str, str] = {}
    for trace in failed:
        examples.setdefault(trace.reason or "", trace.message or "")
    counts = Counter(trace.reason or "" for trace in failed)
    return [
        {"reason": reason, "count": count, "example": examples[reason]}
        for reason, count in counts.most_common()
    ]


def _all(requests: Sequence[Figures], name: str) -> list[float]:
    return [value for request in requests for value in request.of(name)]


def _goodput(
    requests: Sequence[Figures], slo: Mapping[str, float] | None, of: int, per_second: float
) -> dict[str, Any] | None:
    """Requests that kept every limit; those that failed did not."""
    if not slo:
        return None
    good = sum(meets(request, slo) for request in requests)
    share = good / of if of else 0.0
    return {"slo": dict(slo), "requests": good, "share": share, "per_s": good * per_second}


def _row(name: str, values: Mapping[str, float]) -> str:
    if name in _UNITLESS:
        shown = [f"{values[key]:10.3f}" for key in ("p50", "p90", "p99", "mean")]
        return f"{_TITLES[name]:24}{''.join(shown)}{values['count']:9}"
    shown = [f"{1e3 * values[key]:10.2f}" for key in ("p50", "p90", "p99", "mean")]
    return f"{_TITLES[name] + ', ms':24}{''.join(shown)}{values['count']:9}"


def _throughput(found: Mapping[str, Any]) -> list[str]:
    rates = found["throughput"]
    parts = [f"{rates['requests_per_s']:.2f} requests/s"]
    if found["tokens"]["source"]:
        unit = {"usage": "tokens", "chunks": "chunks", "mixed": "tokens and chunks"}
        parts.append(f"{rates['tokens_per_s']:.1f} {unit[found['tokens']['source']]}/s")
    if found["audio_seconds"]:
        parts.append(f"{rates['audio_s_per_s']:.2f} s of audio per s")
    if found["images"]:
        parts.append(f"{rates['images_per_s']:.3f} images/s")
    lines = [", ".join(parts)]
    good = found["goodput"]
    if good is not None:
        limits = ", ".join(f"{name} <= {limit:g}" for name, limit in good["slo"].items())
        lines.append(
            f"goodput {good['per_s']:.2f} requests/s: {good['requests']} "
            f"({100 * good['share']:.1f} %) kept {limits}"
        )
    return lines
