"""What the nodes around the decoders run: batches in, batches out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mstar.engine.captured import Record
from mstar.engine.captured_batches import CapturedBatches
from mstar.engine.kernels.staging import to_host
from mstar.models.qwen3_omni.material import Material
from mstar.models.qwen3_omni.networks import Omni
from mstar.models.qwen3_omni.pixels import normalised
from mstar.models.qwen3_omni.vocoder import Vocoder, VocoderStream

__all__ = ["VocoderJob", "VocoderRunner", "audio_runner", "chunk_sizes", "vision_runner"]

_FIRST_CHUNK, _LARGEST_CHUNK = 2, 32
# Frames of a captured batch: in larger ones the GPU is busy for longer, and their memory would be
# kept for good.
_CAPTURED_FRAMES = 64


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


def chunk_sizes() -> Iterator[int]:
    """Frames that the vocoder is given at a time: few at first, so that sound comes early. A chunk
    is heard while the next one, twice as large, is made."""
    size = _FIRST_CHUNK
    while True:
        yield size
        size = min(2 * size, _LARGEST_CHUNK)


class VocoderRunner:
    """Makes frames heard.

    Args:
        record: how batches are captured (see `engine.captured`); None for not at all.
    """

    def __init__(self, vocoder: Vocoder, record: Record | None = None) -> None:
        self.batches = CapturedBatches(record)
        self._vocoder = vocoder

    def run(self, jobs: list[VocoderJob]) -> list[np.ndarray]:
        """A node's `run`: frames -> the samples int16 that they make certain."""
        vocoder, streams = self._vocoder, [job.stream for job in jobs]
        codes = torch.stack([torch.stack(job.frames, 1) for job in jobs])
        inputs = codes, *vocoder.states(streams)
        with self.batches.run(vocoder.advance, *inputs) as (waves, *after):
            samples = waves.mul(32767).to(torch.int16)
            vocoder.proceed(streams, codes.shape[2], after)
            return list(to_host(samples).numpy())

    def capture(self, most: int) -> None:
        """Capture the chunks that a stream is given before its last one, at most so many
        together."""
        vocoder, shapes, frames = self._vocoder, [], 0
        for size in chunk_sizes():
            shape = size, min(frames, vocoder.synthesis.context)
            if shapes[-1:] == [shape]:  # all that follow are alike
                break
            shapes.append(shape)
            frames += size
        for size, before in reversed(shapes):
            stream = vocoder.stream()
            stream.rows = stream.rows.new_zeros(before, stream.rows.shape[1])
            inputs = vocoder.states([stream])
            codes = inputs[0].new_zeros(1, vocoder.config.num_quantizers, size)
            count = min(most, _CAPTURED_FRAMES // size)
            self.batches.capture(vocoder.advance, codes, *inputs, most=count)
