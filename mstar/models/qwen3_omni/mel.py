"""Sound to log-mel features, those of Whisper (arXiv 2212.04356, section 2.2) with 128 bands."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["SAMPLE_RATE", "frames_of", "log_mel", "mel_filters"]

SAMPLE_RATE = 16000
_FFT = 400
_HOP = 160


def frames_of(samples: int) -> int:
    """Frames of so many samples: whole hops of 10 ms."""
    return samples // _HOP


def log_mel(samples: np.ndarray, bands: int = 128) -> Tensor:
    """Features float32 `[bands, frames]` of mono sound at 16 kHz.

    Raises:
        ValueError: it is shorter than a frame.
    """
    frames = frames_of(len(samples))
    if not frames:
        raise ValueError(f"{len(samples)} samples at 16 kHz are less than a frame of {_HOP}")
    padded = torch.from_numpy(np.pad(np.asarray(samples, np.float32), _FFT // 2, mode="reflect"))
    window = torch.hann_window(_FFT)
    spectrum = torch.stft(padded, _FFT, _HOP, window=window, center=False, return_complex=True)[
        :, :frames
    ]
    power = spectrum.real.square() + spectrum.imag.square()
    levels = (mel_filters(bands) @ power).clamp_min(1e-10).log10()
    return (torch.maximum(levels, levels.max() - 8.0) + 4.0) / 4.0


@cache
def mel_filters(bands: int) -> Tensor:
    """Triangles of equal area up to 8 kHz, float32 `[bands, frequencies]` (Slaney 1998)."""
    edges = _hertz(np.linspace(0.0, _mels(SAMPLE_RATE / 2), bands + 2))
    frequencies = np.linspace(0.0, SAMPLE_RATE / 2, _FFT // 2 + 1)
    left, middle, right = (edges[i : i + bands, None] for i in range(3))
    rise = (frequencies - left) / (middle - left)
    fall = (right - frequencies) / (right - middle)
    triangles = np.maximum(0.0, np.minimum(rise, fall)) * (2.0 / (right - left))
    return torch.from_numpy(triangles.astype(np.float32))


# The Auditory Toolbox's scale: linear up to 1 kHz at 15 mels, then 27 mels for a factor of 6.4.
_LINEAR, _KNEE = 200.0 / 3.0, 1000.0
_STEP = np.log(6.4) / 27.0


def _mels(hertz: float) -> float:
    return _KNEE / _LINEAR + np.log(hertz / _KNEE) / _STEP if hertz >= _KNEE else hertz / _LINEAR


def _hertz(mels: np.ndarray) -> np.ndarray:
    knee = _KNEE / _LINEAR
    return np.where(mels >= knee, _KNEE * np.exp(_STEP * (mels - knee)), _LINEAR * mels)
