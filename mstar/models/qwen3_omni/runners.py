"""What the nodes around the decoders run: batches in, batches out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mstar.engine.kernels.staging import to_host
from mstar.models.qwen3_omni.material import Material
from mstar.models.qwen3_omni.networks import Omni
from mstar.models.qwen3_omni.pixels import normalised
from mstar.models.qwen3_omni.vocoder import Vocoder, VocoderStream

__all__ = ["VocoderJob", "audio_runner", "vision_runner", "vocoder_runner"]


def vision_runner(omni: Omni, device: torch.device) -> Callable[[list[Material]], list[Tensor]]:
    """Images and videos -> inputs of the Thinker `[tokens, (1 + deepstack) * hidden]`."""
    merged = omni.vision.config.merged

    def run(media: list[Material]) -> list[Tensor]:
        visuals = [medium.visual for medium in media]
        patches = torch.cat([visual.patches for visual in visuals]).to(device)
        seen = omni.vision(normalised(patches), [visual.grid for visual in visuals])
        rows = omni.thinker.wide(seen.rows, seen.features)
        return _parts(rows, [visual.grid.patches // merged for visual in visuals])

    return run


def audio_runner(omni: Omni, device: torch.device) -> Callable[[list[Material]], list[Tensor]]:
    """Sounds -> embeddings of the Thinker `[tokens, hidden]`."""
    tokens = omni.audio.config.tokens

    def run(media: list[Material]) -> list[Tensor]:
        features = torch.cat([medium.features for medium in media], 1).to(device)
        frames = [medium.features.shape[1] for medium in media]
        return _parts(omni.audio(features, frames), [tokens(count) for count in frames])

    return run


def _parts(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """The rows of each medium, in memory of their own, since they are kept for different times."""
    parts = rows.split(counts)
    return [part.clone() for part in parts] if len(parts) > 1 else list(parts)


@dataclass(frozen=True, eq=False)
class VocoderJob:
    """More frames of a stream: codes int64 `[groups]` of each."""

    stream: VocoderStream
    frames: list[Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """What jobs of one batch have in common."""
        return len(self.frames), len(self.stream.rows)


def vocoder_runner(vocoder: Vocoder) -> Callable[[list[VocoderJob]], list[np.ndarray]]:
    """Frames -> the samples int16 that they make certain."""

    def run(jobs: list[VocoderJob]) -> list[np.ndarray]:
        codes = torch.stack([torch.stack(job.frames, 1) for job in jobs])
        waves = vocoder.extend(codes, [job.stream for job in jobs])
        return list(to_host(waves.mul(32767).to(torch.int16)).numpy())

    return run
