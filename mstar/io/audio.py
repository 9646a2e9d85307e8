"""Sound as the bytes of a file."""

from __future__ import annotations

import io
import struct

import numpy as np

from mstar.errors import InvalidRequest
from mstar.types import AudioBuffer

__all__ = ["FORMATS", "check_format", "encode_audio", "open_wav_header"]

# Name, which is also the extension -> container and encoding in the words of libsndfile.
FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
_UNKNOWN_LENGTH = struct.pack("<I", 0xFFFFFFFF)


def check_format(name: str) -> None:
    """Make sure that sound can be encoded as `name` on this machine.

    Raises:
        InvalidRequest: it is not one of `FORMATS`, or this machine's libsndfile lacks it.
    """
    if name not in FORMATS:
        raise InvalidRequest("format", name, f"must be one of {', '.join(FORMATS)}")
    if name == "wav":
        return
    try:
        import soundfile
    except OSError as error:
        raise InvalidRequest("format", name, f"needs libsndfile ({error}); wav does not") from None
    if not soundfile.check_format(*FORMATS[name]):
        version = soundfile.__libsndfile_version__
        raise InvalidRequest("format", name, f"is not in this machine's libsndfile {version}")


def encode_audio(audio: AudioBuffer, format: str) -> bytes:
    """The bytes of a mono file; `wav` and `flac` keep the samples exactly.

    Raises:
        InvalidRequest: the format is not known, cannot hold that sample rate, or there are no
            samples, which only `wav` can hold.
    """
    check_format(format)
    if format == "wav":
        return audio.to_wav()
    if len(audio) == 0:
        raise InvalidRequest("audio", "0 samples", f"{format} cannot hold no sound at all, wav can")
    import soundfile

    out = io.BytesIO()
    rate = audio.sample_rate
    container, encoding = FORMATS[format]
    try:
        file = soundfile.SoundFile(out, "w", rate, 1, format=container, subtype=encoding)
    except soundfile.LibsndfileError as error:
        raise InvalidRequest(
            "sample_rate", rate, f"not for {format}: {error.error_string}"
        ) from None
    with file:
        # libsndfile's Vorbis encoder keeps a whole write on the stack: a second at a time
        for start in range(0, len(audio), rate):
            file.write(audio.pcm[start : start + rate])
    return out.getvalue()


def open_wav_header(sample_rate: int) -> bytes:
    """The header of a mono int16 WAV of unknown length, as players expect from a pipe."""
    header = bytearray(AudioBuffer(np.zeros(0, np.int16), sample_rate).to_wav())
    header[4:8] = header[40:44] = _UNKNOWN_LENGTH
    return bytes(header)
