"""Sound as a file that is sent before it is complete."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from mstar.errors import InvalidRequest
from mstar.io.audio import open_wav_header
from mstar.types import AudioBuffer

__all__ = ["FORMATS", "PCM_RATE", "Encoder", "check_encoder", "encode_whole", "open_encoder"]

PCM_RATE = 24_000  # Hz; samples without a header cannot say it, so it is always this

# Name on the wire -> content type.
FORMATS = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
# Name -> container, codec, sample format and container options in the words of FFmpeg.
_CODED: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "mp3": ("mp3", "libmp3lame", "s16p", {"write_xing": "0", "id3v2_version": "0"}),
    "opus": ("ogg", "libopus", "s16", {"page_duration": "60000"}),
    "aac": ("adts", "aac", "fltp", {}),
    "flac": ("flac", "flac", "s16", {}),
    "pcm": ("s16le", "pcm_s16le", "s16", {}),  # where the rate has to be changed
}
_BIT_RATE = {"mp3": 128_000, "opus": 64_000, "aac": 128_000}


class Encoder(Protocol):
    """Takes mono int16 samples piece by piece and gives the bytes of a file."""

    weight: int  # work per sample, in bytes that could be copied instead

    def push(self, pcm: np.ndarray) -> bytes:
        """The bytes that are certain once samples `[n]` are added; maybe none."""

    def finish(self) -> bytes:
        """What is left, and the end of the file."""


def check_encoder(
    format: str, sample_rate: int | None = None, *, field: str = "response_format"
) -> None:
    """Make sure that this machine can encode it.

    Args:
        format: one of `FORMATS`.
        sample_rate: of the sound, in Hz.
        field: to name in errors.

    Raises:
        InvalidRequest: it cannot; another format is never sent instead.
    """
    if _is_plain(format, sample_rate or PCM_RATE):
        return
    try:
        import av

        av.codec.Codec(_CODED[format][1], "w")
    except ImportError:
        others = "wav does not" if format == "pcm" else "wav and pcm do not"
        allowed = f"needs PyAV on the server (pip install 'mstar[server]'); {others}"
        raise InvalidRequest(field, format, allowed) from None
    except ValueError:  # av.codec.codec.UnknownCodecError
        allowed = "is not in the server's build of FFmpeg; wav and pcm work"
        raise InvalidRequest(field, format, allowed) from None


def open_encoder(format: str, sample_rate: int) -> Encoder:
    """An encoder of mono int16 samples at `sample_rate` Hz."""
    if _is_plain(format, sample_rate):
        return Plain(open_wav_header(sample_rate) if format == "wav" else b"")
    return Coded(format, sample_rate)


def _is_plain(format: str, sample_rate: int) -> bool:
    return format == "wav" or (format == "pcm" and sample_rate == PCM_RATE)


def encode_whole(format: str, pcm: np.ndarray, sample_rate: int) -> bytes:
    """A file with all samples `[n]`; a WAV says how long it is."""
    if format == "wav":
        return AudioBuffer(pcm, sample_rate).to_wav()
    encoder = open_encoder(format, sample_rate)
    return encoder.push(pcm) + encoder.finish()


class Plain:
    """Samples as they are, behind a header."""

    weight = 2  # work per sample, in bytes that could be copied instead

    def __init__(self, header: bytes = b"") -> None:
        self._header = header

    def push(self, pcm: np.ndarray) -> bytes:
        """Samples `[n]` as bytes."""
        header, self._header = self._header, b""
        return header + np.asarray(pcm, dtype="<i2").tobytes()

    def finish(self) -> bytes:
        """What is left."""
        return b""


class Coded:
    """FFmpeg through PyAV, into memory. What comes out lags behind what went in until `finish`."""

    weight = 128

    def __init__(self, format: str, sample_rate: int) -> None:
        import av

        container, codec, layout, options = _CODED[format]
        self._av: Any = av
        self._out = _Out()
        self._file = av.open(self._out, "w", format=container, container_options=options)
        rate = PCM_RATE if format == "pcm" else sample_rate
        self._stream = self._file.add_stream(codec, rate=rate, layout="mono")
        self._stream.codec_context.format = layout
        if format in _BIT_RATE:
            self._stream.bit_rate = _BIT_RATE[format]
        self._rate, self._samples = sample_rate, 0

    def push(self, pcm: np.ndarray) -> bytes:
        """The bytes that are certain once samples `[n]` are added; maybe none."""
        if not len(pcm):
            return b""
        samples = np.ascontiguousarray(pcm, dtype=np.int16).reshape(1, -1)
        frame = self._av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts = self._rate, self._samples
        self._samples += frame.samples
        self._file.mux(self._stream.encode(frame))
        return self._out.take()

    def finish(self) -> bytes:
        """What is left, and the end of the file."""
        self._file.mux(self._stream.encode(None))
        self._file.close()
        return self._out.take()

    def __del__(self) -> None:
        """Of a file that nobody finished: closed, it gives back its threads at once."""
        if (file := getattr(self, "_file", None)) is not None:
            file.close()


class _Out:
    """A file that cannot seek."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data
