"""From what one request saw to its figures: pure functions of times in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mstar.bench.trace import Trace

__all__ = ["LATENCIES", "Figures", "Underruns", "figures", "meets", "percentile", "underruns"]

LATENCIES = (
    *("connect", "ttft", "itl", "tpot", "first_audio", "first_image", "e2e"),
    *("rtf", "underruns", "underrun_seconds"),
)
LATE = 0.001  # seconds that any player's buffer hides


@dataclass(frozen=True)
class Underruns:
    """How often playback stood still, and for how long in all."""

    count: int
    seconds: float


@dataclass(frozen=True)
class Figures:
    """The figures of one request in seconds; None for what it does not have.

    Attributes:
        ttft: to the first piece of text.
        itl: the gaps between pieces of text.
        tpot: mean seconds per token of text after the first.
        first_audio, first_image: to the first of them.
        e2e: to the end.
        rtf: to the last sound, divided by the length of the sound; below 1 is faster than speech.
        underruns, underrun_seconds: see `underruns`.
        tokens: generated, by the server's count, or pieces of text where it gives none.
        counted: whether `tokens` is the server's count.
    """

    e2e: float
    connect: float | None = None
    ttft: float | None = None
    itl: tuple[float, ...] = ()
    tpot: float | None = None
    first_audio: float | None = None
    first_image: float | None = None
    rtf: float | None = None
    underruns: int | None = None
    underrun_seconds: float | None = None
    audio_seconds: float = 0.0
    images: int = 0
    prompt_tokens: int | None = None
    tokens: int = 0
    counted: bool = False

    def of(self, name: str) -> tuple[float, ...]:
        """All values of a latency: many for `itl`, else one or none."""
        value = getattr(self, name)
        if name == "itl":
            return value
        return () if value is None else (value,)


def figures(trace: Trace) -> Figures:
    """The figures of a request that is done."""
    assert trace.sent is not None
    assert trace.end is not None
    start, text = trace.sent, trace.text
    itl = tuple(after - before for before, after in pairwise(text))
    text_tokens = trace.text_tokens if trace.text_tokens is not None else len(text)
    timed = trace.audio_is_timed and bool(trace.audio)
    length = sum(seconds for _, seconds in trace.audio)
    stops = underruns(trace.audio) if timed else None
    return Figures(
        e2e=trace.end - start,
        connect=trace.connect,
        ttft=text[0] - start if text else None,
        itl=itl,
        tpot=(text[-1] - text[0]) / (text_tokens - 1) if itl and text_tokens > 1 else None,
        first_audio=trace.audio[0][0] - start if trace.audio else None,
        first_image=trace.images[0] - start if trace.images else None,
        rtf=(trace.audio[-1][0] - start) / length if timed and length > 0 else None,
        underruns=stops.count if stops else None,
        underrun_seconds=stops.seconds if stops else None,
        audio_seconds=length,
        images=len(trace.images),
        prompt_tokens=trace.prompt_tokens,
        tokens=trace.tokens if trace.tokens is not None else len(text),
        counted=trace.tokens is not None,
    )


def underruns(audio: Sequence[tuple[float, float]]) -> Underruns:
    """Play each chunk as soon as it is there and the one before is over, from the first on.

    Args:
        audio: when each chunk came, and how long it sounds.

    Returns:
        The waits for a chunk of more than a millisecond, which any player's buffer hides.
    """
    count, stood, over = 0, 0.0, None
    for at, seconds in audio:
        if seconds <= 0:
            continue
        if over is not None and at - over > LATE:
            count += 1
            stood += at - over
        over = max(at, over if over is not None else at) + seconds
    return Underruns(count, stood)


def percentile(values: Sequence[float], q: float) -> float:
    """The `q`-th percentile (0 to 100) of values in order, interpolated between neighbours."""
    place = (len(values) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def meets(request: Figures, slo: Mapping[str, float]) -> bool:
    """Whether a request stays within every limit; what it does not have, it does not meet.

    For `itl` the 99th percentile of the request's own gaps counts; without any gap it is met if
    there is text at all.
    """
    return all(_meets(request, name, limit) for name, limit in slo.items())


def _meets(request: Figures, name: str, limit: float) -> bool:
    values = sorted(request.of(name))
    if name == "itl" and not values:
        return request.ttft is not None
    return bool(values) and percentile(values, 99) <= limit
