"""The codec as the engine runs it: windows of codes in, int16 samples out, batched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mstar.engine.captured import Record, Step
from mstar.engine.captured_batches import CapturedBatches
from mstar.engine.kernels.staging import send, to_host
from mstar.models.orpheus.frames import by_level, to_pcm16
from mstar.models.orpheus.noise import FrameNoise, by_block
from mstar.models.orpheus.snac import SnacDecoder

__all__ = ["Codec", "CodecJob"]

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


class Codec:
    """Decodes windows.

    Args:
        record: how batches are captured (see `engine.captured`); None for not at all.
    """

    def __init__(self, snac: SnacDecoder, device: torch.device, record: Record | None = None):
        self.batches = CapturedBatches(record)
        self._snac, self._device = snac, device
        ramp = np.linspace(0, np.pi / 2, int(FADE_SECONDS * snac.config.sampling_rate))
        self._ramp = np.sin(ramp) ** 2
        self._lengths = snac.noise_lengths(1)
        self._noise = FrameNoise(sum(self._lengths))

    def run(self, jobs: list[CodecJob]) -> list[np.ndarray]:
        """A node's `run`: jobs of equal shape in, int16 samples of each job out."""
        first = jobs[0]
        with self.batches.run(self._step(first), *self._inputs(jobs), key=first.keep) as (heard,):
            waves = to_host(heard).numpy()
            return [self._finish(wave, job) for wave, job in zip(waves, jobs, strict=True)]

    def capture(self, chunk: int, most: int) -> None:
        """Capture the windows in the middle of an utterance.

        Args:
            chunk: frames of a window that are heard.
            most: windows in a batch.
        """
        context = self._snac.config.context_frames
        frames, keep = chunk + 2 * context, (context, context + chunk)
        for seed in (None, 0) if self._lengths else (None,):
            job = CodecJob([0] * 7 * frames, 0, frames, seed, keep)
            self.batches.capture(self._step(job), *self._inputs([job]), most=most, key=keep)

    def _inputs(self, jobs: list[CodecJob]) -> tuple[Tensor, ...]:
        """Codes `[jobs, frames * 7]`, level by level, and noise `[jobs, frames, steps]` if any."""
        levels = by_level(torch.tensor([job.codes for job in jobs]))
        codes = send(torch.cat(levels, 1), self._device)
        if jobs[0].seed is None:
            return (codes,)
        windows = [self._noise.window(job.seed, job.low, job.high) for job in jobs]
        return codes, send(torch.stack(windows), self._device)

    def _step(self, job: CodecJob) -> Step:
        """Decodes a batch of jobs of the shape of `job`."""
        frames, keep = job.cost, job.keep

        def step(codes: Tensor, noise: Tensor | None = None) -> tuple[Tensor]:
            levels = codes.split([frames, 2 * frames, 4 * frames], 1)
            blocks = None if noise is None else by_block(noise, self._lengths)
            return (self._snac(levels, blocks, keep=keep),)

        return step

    def _finish(self, heard: np.ndarray, job: CodecJob) -> np.ndarray:
        ramp = self._ramp
        size = min(len(ramp), len(heard))
        if job.fade_in:
            heard[:size] *= ramp[:size]
        if job.fade_out:
            heard[-size:] *= ramp[:size][::-1]
        return to_pcm16(heard)
