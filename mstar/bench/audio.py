"""How long a stream of PCM sounds, while it comes."""

from __future__ import annotations

import re
import struct

from mstar.bench.trace import Bad

__all__ = ["PcmMeter", "is_pcm"]

_RATE = re.compile(r"rate=(\d+)")
_CHANNELS = re.compile(r"channels=(\d+)")
_MAGIC = (b"ID3", b"fLaC", b"OggS", b"\xff\xfb", b"\xff\xf3", b"\xff\xf1")
_HEADER = 44  # the shortest header of a WAV file


def is_pcm(content_type: str, start: bytes) -> bool:
    """Whether a body is PCM or WAV, not something compressed."""
    kind = content_type.split(";")[0].strip().lower()
    known = ("audio/mpeg", "audio/ogg", "audio/aac", "audio/flac", "audio/opus", "audio/mp4")
    return kind not in known and not start.startswith(_MAGIC)


class PcmMeter:
    """Seconds of s16le in pieces cut anywhere; a WAV header in front of a piece is understood.

    Args:
        content_type: may say `rate=` and `channels=`; else 24 kHz, mono.
    """

    def __init__(self, content_type: str = "") -> None:
        rate, channels = _RATE.search(content_type), _CHANNELS.search(content_type)
        self._set(int(rate[1]) if rate else 24000, int(channels[1]) if channels else 1, 2)
        self._head = b""

    def feed(self, data: bytes) -> float:
        """The seconds in `data`; 0 while a header is not complete."""
        data, self._head = self._head + data, b""
        if b"RIFF".startswith(data[:4]) and data and len(data) < _HEADER:
            self._head = data
            return 0.0
        if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
            begin = self._wav(data)
            if begin is None:
                self._head = data
                return 0.0
            data = data[begin:]
        return len(data) / self._bytes_per_second

    def _set(self, rate: int, channels: int, width: int) -> None:
        if not (rate and channels and width):
            raise Bad("strange audio", f"{rate} Hz, {channels} channels, {width} bytes a sample")
        self._bytes_per_second = rate * channels * width

    def _wav(self, data: bytes) -> int | None:
        """Where the samples begin; None if the header goes on."""
        place = 12
        while place + 8 <= len(data):
            name, size = data[place : place + 4], struct.unpack_from("<I", data, place + 4)[0]
            if name == b"data":
                return place + 8
            if name == b"fmt " and place + 24 <= len(data):
                _, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", data, place + 8)
                self._set(rate, channels, bits // 8)
            place += 8 + size + size % 2
        return None
