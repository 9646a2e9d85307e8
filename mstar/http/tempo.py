"""Speech that is faster or slower and keeps its pitch."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from mstar.errors import InvalidRequest
from mstar.http.encoders import Encoder

__all__ = ["FASTEST", "SLOWEST", "Paced", "Tempo", "check_speed"]

SLOWEST, FASTEST = 0.25, 4.0


def check_speed(value: Any, field: str = "speed") -> float:
    """`value`, if sound can be given that speed on this machine.

    Raises:
        InvalidRequest: it cannot.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not SLOWEST <= value <= FASTEST:
        raise InvalidRequest(field, value, f"must be a number from {SLOWEST:g} to {FASTEST:g}")
    if value != 1:
        try:
            import av  # noqa: F401
        except ImportError:
            allowed = "other than 1 needs PyAV on the server (pip install 'mstar[server]')"
            raise InvalidRequest(field, value, allowed) from None
    return float(value)


class Paced:
    """An `Encoder` of sound at another speed than it is pushed.

    Args:
        encoder: of the sound that comes out.
        speed, sample_rate: see `Tempo`.
    """

    def __init__(self, encoder: Encoder, speed: float, sample_rate: int) -> None:
        self._encoder, self._tempo = encoder, Tempo(speed, sample_rate)
        self.weight = Tempo.weight + math.ceil(encoder.weight / speed)

    def push(self, pcm: np.ndarray) -> bytes:
        """See `Encoder.push`."""
        paced = self._tempo.push(pcm)
        return self._encoder.push(paced) if len(paced) else b""

    def finish(self) -> bytes:
        """See `Encoder.finish`."""
        rest = self._tempo.finish()
        last = self._encoder.push(rest) if len(rest) else b""
        return last + self._encoder.finish()


class Tempo:
    """Changes the speed of mono int16 samples piece by piece, with FFmpeg's `atempo`.

    It works on overlapping windows, so what comes out lags behind what went in until `finish`.

    Args:
        speed: above 1 is faster; one pass changes it by a factor of 2 at most, so there are
            several where more is asked for.
        sample_rate: in Hz.
    """

    weight = 64  # work per sample, in bytes that could be copied instead

    def __init__(self, speed: float, sample_rate: int) -> None:
        import av

        self._av: Any = av
        self._speed, self._rate = speed, sample_rate
        self._samples = self._made = 0
        passes = max(1, math.ceil(abs(math.log2(speed))))
        graph = av.filter.Graph()
        base = Fraction(1, sample_rate)
        self._in = graph.add_abuffer(
            format="s16", sample_rate=sample_rate, layout="mono", time_base=base
        )
        last = self._in
        for _ in range(passes):
            node = graph.add("atempo", f"{speed ** (1 / passes):.9f}")
            last.link_to(node)
            last = node
        self._out = graph.add("abuffersink")
        last.link_to(self._out)
        graph.configure()
        self._graph = graph

    def push(self, pcm: np.ndarray) -> np.ndarray:
        """The samples `[m]` that are certain once samples `[n]` are added; maybe none."""
        if len(pcm):
            samples = np.ascontiguousarray(pcm, dtype=np.int16).reshape(1, -1)
            frame = self._av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts = self._rate, self._samples
            frame.time_base = Fraction(1, self._rate)
            self._samples += samples.shape[1]
            self._in.push(frame)
        return self._pulled()

    def finish(self) -> np.ndarray:
        """The samples that are left. The filter is some milliseconds wrong at the end, more so with
        sounds that are no longer than one of its windows: that is cut off, or filled with silence.
        """
        self._in.push(None)
        missing = max(1, round(self._samples / self._speed)) - self._made
        rest = self._pulled()
        return np.pad(rest[: max(0, missing)], (0, max(0, missing - len(rest))))

    def _pulled(self) -> np.ndarray:
        pieces = [np.zeros(0, np.int16)]
        while True:
            try:
                pieces.append(self._out.pull().to_ndarray().reshape(-1))
            except (self._av.BlockingIOError, self._av.EOFError):
                made = np.concatenate(pieces)
                self._made += len(made)
                return made
