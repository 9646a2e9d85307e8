"""Sounds of a request: from whatever was given to mono at 16 kHz."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from mstar.errors import InvalidRequest
from mstar.io.probe import Unreadable, open_container, probe_audio
from mstar.io.rgb import shown
from mstar.models.qwen3_omni.mel import SAMPLE_RATE, frames_of
from mstar.models.qwen3_omni.resample import resampled

__all__ = ["Sound", "read_sound", "sound_of_video"]

_LONGEST = 3600.0  # seconds
_MOST_CHANNELS = 64
_LOUDEST = 2.0**31  # the powers of what is much louder are no float32; sound is within 1


@dataclass(frozen=True, eq=False)
class Sound:
    """Mono sound float32 `[samples]` at 16 kHz; `key` is a hash of it."""

    key: bytes
    samples: np.ndarray

    @property
    def frames(self) -> int:
        """Of its mel features."""
        return frames_of(len(self.samples))


def read_sound(value: Any, longest: float = _LONGEST) -> Sound:
    """Open a sound; several channels are averaged.

    Args:
        value: a path, bytes, `(filename, bytes)`, `(samples, sample_rate)` or an `AudioBuffer`.
        longest: seconds, refused beyond that.

    Raises:
        InvalidRequest: it is not a sound, a broken one, or one that is too short or too long.
    """
    try:
        return _read(value, longest)
    except ModuleNotFoundError:
        allowed = "this format needs PyAV: pip install mstar[video]"
    except ValueError as error:
        allowed = str(error)
    raise InvalidRequest("audio", _shown(value), allowed)


def sound_of_video(data: bytes, longest: float = _LONGEST) -> Sound | None:
    """The sound of a video file; `None` if it has none.

    Raises:
        ValueError: it is broken, too short or too long.
    """
    import av

    try:
        with open_container(data) as file:
            if not file.streams.audio:
                return None
            return _finished(*_contained(file, longest), longest)
    except av.FFmpegError as error:
        raise ValueError(f"it is broken: {error.strerror}") from None


def _read(value: Any, longest: float) -> Sound:
    if hasattr(value, "pcm") and hasattr(value, "sample_rate"):
        value = value.pcm, value.sample_rate
    if isinstance(value, (str, PathLike)):
        try:
            value = Path(value).read_bytes()
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None
    if isinstance(value, (tuple, list)) and len(value) == 2:
        if not isinstance(value[1], (bytes, bytearray, memoryview)):
            return _finished(_of_array(value[0]), value[1], longest)
        value = value[1]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _of_file(bytes(value), longest)
    raise ValueError("must be a path, bytes, (filename, bytes) or (samples, sample_rate)")


def _finished(samples: np.ndarray, rate: Any, longest: float) -> Sound:
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or not rate >= 1:
        raise ValueError(f"sample_rate={rate!r}: must be a number of Hz")
    if len(samples) > longest * rate:
        raise ValueError(f"it is longer than {longest:g} seconds")
    if not (np.abs(samples) <= _LOUDEST).all():
        raise ValueError(f"it holds samples that are no numbers, or beyond {_LOUDEST:g}")
    samples = resampled(samples, round(rate), SAMPLE_RATE)
    if not frames_of(len(samples)):
        raise ValueError(f"it has {len(samples) / 16:g} ms, and must have 10 at least")
    return Sound(hashlib.blake2b(samples.tobytes(), digest_size=16).digest(), samples)


def _of_array(value: Any) -> np.ndarray:
    """Mono float32 of an array `[samples]`, `[samples, channels]` or `[channels, samples]`."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    value = np.asarray(value)
    if value.ndim == 2 and min(value.shape) <= _MOST_CHANNELS and value.size:
        value, whole = value.astype(np.float64), value.dtype
        value = value.mean(int(np.argmin(value.shape)))
    else:
        whole = value.dtype
    if value.ndim != 1 or whole.kind not in "iuf":
        raise ValueError("samples must be an array of numbers, [samples] or [samples, channels]")
    if whole.kind == "f":
        return value.astype(np.float32)
    middle = 2 ** (8 * whole.itemsize - 1)
    return ((value - (middle if whole.kind == "u" else 0)) / middle).astype(np.float32)


def _of_file(data: bytes, longest: float) -> Sound:
    try:
        stated = probe_audio(data, longest)
    except Unreadable as error:
        raise ValueError(str(error)) from None
    if stated.seconds > longest:
        raise ValueError(f"it is longer than {longest:g} seconds")
    try:
        import soundfile
    except OSError:  # there is no libsndfile
        soundfile = None
    if soundfile is not None:
        try:
            return _finished(*_of_libsndfile(soundfile, data, longest), longest)
        except (soundfile.SoundFileError, TypeError):
            pass
    import av

    try:
        with open_container(data) as file:
            if not file.streams.audio:
                raise ValueError("it holds no sound")
            return _finished(*_contained(file, longest), longest)
    except av.FFmpegError as error:
        raise ValueError(f"it is broken: {error.strerror}") from None


def _of_libsndfile(soundfile: Any, data: bytes, longest: float) -> tuple[np.ndarray, int]:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        rate, parts = file.samplerate, []
        left = int(longest * rate) + 1
        while left > 0:
            block = file.read(min(left, 10 * rate), dtype="float32", always_2d=True)
            if not len(block):
                break
            parts.append(block.mean(1))
            left -= len(block)
    return np.concatenate(parts) if parts else np.zeros(0, np.float32), rate


def _contained(file: Any, longest: float) -> tuple[np.ndarray, int]:
    """Of the first sound in a container."""
    rate = file.streams.audio[0].rate
    parts, total = [], 0
    for block in _blocks(file):
        parts.append(block)
        total += len(block)
        if total > longest * rate:
            break
    return np.concatenate(parts) if parts else np.zeros(0, np.float32), rate


def _blocks(file: Any) -> Iterator[np.ndarray]:
    import av

    floats = av.AudioResampler(format="fltp")
    try:
        for frame in file.decode(audio=0):
            for part in floats.resample(frame):
                yield part.to_ndarray().mean(0)
    except av.InvalidDataError:
        return  # it ends early; what there is can be heard


def _shown(value: Any) -> str:
    is_array = isinstance(value, (tuple, list)) and value and hasattr(value[0], "shape")
    return shown(value[0] if is_array else value)
