"""What the boxes of an MP4 or QuickTime file claim (ISO 14496-12), before FFmpeg believes it.

FFmpeg makes room for every sample that the tables state when it opens a file; a few bytes can
state four billion.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["Claims", "is_isobmff", "walk_isobmff"]

_INSIDE = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"mvex", b"edts")
_FIRST = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"moof", b"styp")
_DEEPEST = 12
_MOST_BOXES = 50_000
_MOST_SAMPLES = 4_000_000  # of all tracks together; an hour of video and sound has half a million
_UNKNOWN = (0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
# The tables whose entries take space in the file -> bytes before the count, bytes per entry.
_TABLES = {b"stts": 8, b"ctts": 8, b"stsc": 12, b"stco": 4, b"co64": 8, b"stss": 4, b"elst": 12}


@dataclass
class Claims:
    """What the boxes state.

    Args:
        seconds: of the longest track, or of the whole.
        samples: of all tracks.
        broken: what is wrong, if something is.
    """

    seconds: float = 0.0
    samples: int = 0
    broken: str = ""


class _Broken(Exception):
    pass


@dataclass
class _Track:
    """What decides how much room FFmpeg makes for a track."""

    handler: bytes = b""
    samples: int = 0
    fixed: bool = False  # all samples have the same size
    single: bool = False  # and the same duration, 1
    chunks: int = 0
    per_chunk: np.ndarray | None = None  # [n, 3]: first chunk, samples in each, description

    def entries(self) -> int:
        """Entries of its index: samples, but 1024 samples each where they are plain sound."""
        if not (self.handler == b"soun" and self.fixed and self.single):
            return self.samples
        if self.per_chunk is None or not len(self.per_chunk):
            return 0
        lengths = np.diff(np.append(self.per_chunk[:, 0], self.chunks + 1)).clip(0)
        return int((lengths * (self.per_chunk[:, 1] // 1024 + 1)).sum())


def is_isobmff(data: bytes) -> bool:
    """Whether this is an MP4 or QuickTime file."""
    return data[4:8] in _FIRST


def walk_isobmff(data: bytes) -> Claims:
    """Look at the boxes that say how much there is."""
    claims = Claims()
    try:
        kinds, track = set(), _Track()
        boxes = _boxes(data, 0, len(data), 0, [0])
        for kind, start, end in itertools.chain(boxes, [(b"trak", 0, 0)]):
            if kind == b"trak":  # the one before is complete
                claims.samples += track.entries()
                track = _Track()
            kinds.add(kind)
            _look(claims, track, data, kind, start, end)
            if claims.samples + (0 if track.fixed else track.samples) > _MOST_SAMPLES:
                raise _Broken(f"states more than {_MOST_SAMPLES} samples")
        if b"moov" not in kinds:
            raise _Broken("is cut off, or broken: it has no index (moov)")
    except _Broken as error:
        claims.broken = str(error)
    return claims


def _boxes(
    data: bytes, at: int, end: int, depth: int, seen: list[int]
) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of every box, depth first."""
    while at + 8 <= end:
        size, kind, head = _number(data, at, 4), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = _number(data, at + 8, 8), 16
        elif size == 0:
            size = end - at
        if size < head:
            raise _Broken("is broken: a box is shorter than its header")
        seen[0] += 1
        if seen[0] > _MOST_BOXES or depth > _DEEPEST:
            raise _Broken("is broken: it has too many boxes")
        last = at + size
        if last > end and kind in (*_INSIDE, *_TABLES, b"stsz", b"stz2"):
            raise _Broken("is cut off, or broken: a box ends behind the file")
        yield kind, at + head, min(last, end)
        if kind in _INSIDE:
            yield from _boxes(data, at + head, last, depth + 1, seen)
        at = last


def _look(claims: Claims, track: _Track, data: bytes, kind: bytes, start: int, end: int) -> None:
    """Add what one box states."""
    room = end - start
    if kind in (b"mvhd", b"mdhd"):
        wide = 8 if data[start : start + 1] == b"\x01" else 4
        scale = start + 4 + 2 * wide
        rate, ticks = _number(data, scale, 4), _number(data, scale + 4, wide)
        if ticks not in _UNKNOWN and rate:
            claims.seconds = max(claims.seconds, ticks / rate)
    elif kind in _TABLES:
        if _number(data, start + 4, 4) * _TABLES[kind] > room:
            raise _Broken(f"is broken: its table {kind.decode()} ends behind its box")
        count = _number(data, start + 4, 4)
        if kind == b"stts":
            track.single = count == 1 and _number(data, start + 12, 4) == 1
        elif kind in (b"stco", b"co64"):
            track.chunks = count
        elif kind == b"stsc":
            table = np.frombuffer(data, ">u4", 3 * count, start + 8)
            track.per_chunk = table.reshape(count, 3).astype(np.int64)
    elif kind == b"hdlr":
        handler = data[start + 8 : start + 12]
        if handler not in (b"url ", b"alis"):  # QuickTime says by them where the data are
            track.handler = handler
    elif kind in (b"stsz", b"stz2"):
        size, count = _number(data, start + 4, 4), _number(data, start + 8, 4)
        track.fixed = fixed = kind == b"stsz" and size > 0
        bits = 32 if kind == b"stsz" else size & 0xFF
        if count * (size if fixed else bits / 8) > (len(data) if fixed else room):
            raise _Broken("is broken: it states more samples than it has")
        track.samples = count
    elif kind == b"trun":
        claims.samples += _number(data, start + 4, 4)


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big")
