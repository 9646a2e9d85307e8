"""Sound as a file that is sent before it is complete."""

from __future__ import annotations

from typing import Any

import numpy as np

from mstar.errors import InvalidRequest
from mstar.io.audio import open_wav_header

__all__ = ["FORMATS", "check_encoder", "open_encoder"]

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
}
_BIT_RATE = {"mp3": 128_000, "opus": 64_000, "aac": 128_000}


def check_encoder(format: str) -> None:
    """Make sure that this machine can encode it.

    Raises:
        InvalidRequest: it cannot; another format is never sent instead.
    """
    if format not in _CODED:
        return
    try:
        import av

        av.codec.Codec(_CODED[format][1], "w")
    except ImportError:
        allowed = "needs PyAV on the server (pip install 'mstar[server]'); wav and pcm do not"
        raise InvalidRequest("response_format", format, allowed) from None
    except ValueError:  # av.codec.codec.UnknownCodecError
        allowed = "is not in the server's build of FFmpeg; wav and pcm work"
        raise InvalidRequest("response_format", format, allowed) from None


def open_encoder(format: str, sample_rate: int) -> Plain | Coded:
    """An encoder of mono int16 samples."""
    if format in _CODED:
        return Coded(format, sample_rate)
    return Plain(open_wav_header(sample_rate) if format == "wav" else b"")


class Plain:
    """Samples as they are, behind a header."""

    weight = 2  # work per sample, in bytes that could be copied instead

    def __init__(self, header: bytes) -> None:
        self._header = header

    def push(self, pcm: np.ndarray) -> bytes:
        """Samples `[n]` as bytes."""
        header, self._header = self._header, b""
        return header + np.asarray(pcm, dtype="<i2").tobytes()

    def finish(self) -> bytes:
        """What is left."""
        return b""


class Coded:
    """FFmpeg through PyAV, into memory."""

    weight = 128

    def __init__(self, format: str, sample_rate: int) -> None:
        import av

        container, codec, layout, options = _CODED[format]
        self._av: Any = av
        self._out = _Out()
        self._file = av.open(self._out, "w", format=container, container_options=options)
        self._stream = self._file.add_stream(codec, rate=sample_rate, layout="mono")
        self._stream.codec_context.format = layout
        if format in _BIT_RATE:
            self._stream.bit_rate = _BIT_RATE[format]
        self._layout, self._rate, self._samples = layout, sample_rate, 0
        # Encoders take frames of their own size; the resampler makes them and converts.
        self._frames = av.AudioResampler(format=layout, layout="mono", rate=sample_rate)

    def push(self, pcm: np.ndarray) -> bytes:
        """The bytes that are certain once samples `[n]` are added; maybe none."""
        samples = np.ascontiguousarray(pcm, dtype=np.int16).reshape(1, -1)
        frame = self._av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = self._rate
        frame.pts = self._samples
        self._samples += samples.shape[1]
        for ready in self._frames.resample(frame):
            self._file.mux(self._stream.encode(ready))
        return self._out.take()

    def finish(self) -> bytes:
        """What is left, and the end of the file."""
        for ready in self._frames.resample(None):
            self._file.mux(self._stream.encode(ready))
        self._file.mux(self._stream.encode(None))
        self._file.close()
        return self._out.take()


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
