"""The codec as the engine runs it: windows of codes in, int16 samples out, batched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mstar.models.orpheus.frames import to_pcm16
from mstar.models.orpheus.snac import SnacDecoder

__all__ = ["CodecJob", "codec_runner"]

FADE_SECONDS = 0.005


@dataclass(frozen=True, eq=False)
class CodecJob:
    """Decode a window and cut out what is heard.

    Args:
        codes: one int64 tensor per codebook, `[frames * stride]`.
        noise: one float32 tensor `[1, 1, samples]` per block, or None for no noise.
        keep: frames of the window that are heard, `[first, last)`.
        fade_in, fade_out: ramp the first or last few milliseconds, where utterances are joined.
    """

    codes: tuple[Tensor, ...]
    noise: list[Tensor] | None
    keep: tuple[int, int]
    fade_in: bool = False
    fade_out: bool = False

    @property
    def shape(self) -> tuple[int, tuple[int, int], bool]:
        """What jobs of one batch have in common."""
        return len(self.codes[0]), self.keep, self.noise is None

    @property
    def cost(self) -> int:
        """Frames to decode."""
        return len(self.codes[0])


def codec_runner(
    snac: SnacDecoder, device: torch.device
) -> Callable[[list[CodecJob]], list[np.ndarray]]:
    """A node's `run`: jobs of equal length in, int16 samples of each job out."""
    ramp = np.sin(np.linspace(0, np.pi / 2, int(FADE_SECONDS * snac.config.sampling_rate))) ** 2

    def run(jobs: list[CodecJob]) -> list[np.ndarray]:
        codes = [
            torch.stack(level).to(device) for level in zip(*(j.codes for j in jobs), strict=True)
        ]
        noise = None
        if jobs[0].noise is not None:
            blocks = zip(*(job.noise for job in jobs), strict=True)
            noise = [torch.cat(block).to(device) for block in blocks]
        waves = snac(codes, noise, keep=jobs[0].keep).cpu().numpy()
        return [finish(wave, job) for wave, job in zip(waves, jobs, strict=True)]

    def finish(heard: np.ndarray, job: CodecJob) -> np.ndarray:
        size = min(len(ramp), len(heard))
        if job.fade_in:
            heard[:size] *= ramp[:size]
        if job.fade_out:
            heard[-size:] *= ramp[:size][::-1]
        return to_pcm16(heard)

    return run
