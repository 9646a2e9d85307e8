"""The codec as the engine runs it: windows of codes in, int16 samples out, batched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mstar.engine.kernels.staging import send, to_host
from mstar.models.orpheus.frames import by_level, to_pcm16
from mstar.models.orpheus.noise import FrameNoise, by_block
from mstar.models.orpheus.snac import SnacDecoder

__all__ = ["CodecJob", "codec_runner"]

FADE_SECONDS = 0.005


@dataclass(frozen=True, eq=False)
class CodecJob:
    """Decode a window and cut out what is heard.

    Args:
        codes: 7 codes of each frame, in the order of their tokens.
        low, high: the frames of the utterance that these are, `[low, high)`.
        seed: of the utterance's noise, or None for no noise.
        keep: frames of the window that are heard, `[first, last)`.
        fade_in, fade_out: ramp the first or last few milliseconds, where utterances are joined.
    """

    codes: list[int]
    low: int
    high: int
    seed: int | None
    keep: tuple[int, int]
    fade_in: bool = False
    fade_out: bool = False

    @property
    def shape(self) -> tuple[int, tuple[int, int], bool]:
        """What jobs of one batch have in common."""
        return self.cost, self.keep, self.seed is None

    @property
    def cost(self) -> int:
        """Frames to decode."""
        return self.high - self.low


def codec_runner(
    snac: SnacDecoder, device: torch.device
) -> Callable[[list[CodecJob]], list[np.ndarray]]:
    """A node's `run`: jobs of equal length in, int16 samples of each job out."""
    ramp = np.sin(np.linspace(0, np.pi / 2, int(FADE_SECONDS * snac.config.sampling_rate))) ** 2
    lengths = snac.noise_lengths(1)
    frame_noise = FrameNoise(sum(lengths))

    def run(jobs: list[CodecJob]) -> list[np.ndarray]:
        first = jobs[0]
        levels = by_level(torch.tensor([job.codes for job in jobs]))
        sizes = [level.shape[1] for level in levels]
        codes = send(torch.cat(levels, 1), device).split(sizes, 1)
        noise = None
        if first.seed is not None:
            windows = [frame_noise.window(j.seed, j.low, j.high) for j in jobs]
            noise = by_block(send(torch.stack(windows), device), lengths)
        waves = to_host(snac(codes, noise, keep=first.keep)).numpy()
        return [finish(wave, job) for wave, job in zip(waves, jobs, strict=True)]

    def finish(heard: np.ndarray, job: CodecJob) -> np.ndarray:
        size = min(len(ramp), len(heard))
        if job.fade_in:
            heard[:size] *= ramp[:size]
        if job.fade_out:
            heard[-size:] *= ramp[:size][::-1]
        return to_pcm16(heard)

    return run
