"""Frames of codes: what completes them, and what the Talker is fed next, for many streams at once.

On a GPU all of it is one captured step (15 passes of the code predictor with their draws, the sums
of embeddings), for batches of 1, 2, 4, 8, ... frames; smaller ones are padded with greedy rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.captured import CapturedSteps
from mstar.engine.kernels.sample import sample_batch
from mstar.engine.kernels.staging import to_device
from mstar.engine.sampler import HostSampler
from mstar.engine.sampling import HostState, SamplingParams
from mstar.engine.spans import Step, Tokens, gather_ids
from mstar.models.qwen3_omni.networks import Omni

__all__ = ["Frame", "FrameJob", "Frames"]

_SIGN = 1 << 63


@dataclass(frozen=True, eq=False)
class FrameJob:
    """Complete a frame.

    Args:
        step: of the Talker, with the first code and its normed hidden state `[1, hidden]`. The code
            is not read on a GPU: it stays there.
        text: the token that is to be said with the next frame.
        sampler: of the other codes, of this stream.
    """

    step: Step
    text: int
    sampler: HostState


@dataclass(frozen=True, eq=False)
class Frame:
    """Codes int64 `[groups]`, and inputs `[1, hidden]` of the Talker's next step."""

    codes: Tensor
    inputs: Tensor


class Frames:
    """Completes frames: `run` is that of a node.

    Args:
        steps: how to run it as one step, as a GPU does; `None` draws row by row on the host.
        max_batch: most frames at a time.
    """

    def __init__(self, omni: Omni, steps: CapturedSteps | None, max_batch: int) -> None:
        self._omni = omni
        self._steps = steps
        self._max_batch = max_batch
        self._passes = len(omni.talker.code_predictor.lm_head)
        self._vocab = omni.talker.code_predictor.config.vocab_size
        self._sampler = HostSampler(self._vocab)

    def open(self, params: SamplingParams) -> HostState:
        """The sampler of a new stream."""
        return self._sampler.open(params, ())

    def run(self, jobs: list[FrameJob]) -> list[Frame]:
        """One frame of every stream."""
        hidden = torch.cat([job.step.hidden for job in jobs])
        first = gather_ids([job.step for job in jobs], hidden.device)
        whole = self._drawn_by_host if self._steps is None else self._in_one_step
        codes, inputs = whole(jobs, hidden, first)
        return [Frame(codes[i], inputs[i : i + 1]) for i in range(len(jobs))]

    def warmup(self) -> None:
        """Capture every batch size."""
        like = self._omni.talker.codec_embedding.weight
        code = Tokens(torch.zeros(1, dtype=torch.int64, device=like.device))
        step = Step(code, 0, like.new_zeros(1, like.shape[1]))
        job = FrameJob(step, 0, self.open(SamplingParams(temperature=0.0)))
        for size in self._sizes() if self._steps is not None else ():
            self.run([job] * size)

    def _drawn_by_host(
        self, jobs: list[FrameJob], hidden: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        states = [job.sampler for job in jobs]
        greedy = all(state.params.temperature == 0 for state in states)

        def choose(scores: Tensor) -> Tensor:
            return scores.argmax(-1) if greedy else _some(self._sampler.sample(scores, states))

        text = to_device([job.text for job in jobs], torch.int64, hidden.device)
        return self._completed(hidden, first, text, choose)

    def _in_one_step(
        self, jobs: list[FrameJob], hidden: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        count = len(jobs)
        size = next(size for size in self._sizes() if size >= count)
        numbers, floats = [], []
        for job in jobs:
            params = job.sampler.params
            keys = []
            for _ in range(self._passes):
                keys.append((job.sampler.next_key() ^ _SIGN) - _SIGN)  # the int64 of the same bits
                job.sampler.drawn += 1
            numbers += job.text, params.top_k or self._vocab, *keys
            floats += params.temperature, params.top_p, params.min_p
        pad = size - count
        numbers += pad * [0, 1, *(0 for _ in range(self._passes))]
        floats += pad * [0.0, 1.0, 0.0]
        device = hidden.device
        codes, inputs = self._steps.run(
            self._step,
            F.pad(hidden, (0, 0, 0, pad)),
            F.pad(first, (0, pad)),
            to_device(numbers, torch.int64, device).view(size, -1),
            to_device(floats, torch.float64, device).view(size, -1),
        )
        return codes[:count].clone(), inputs[:count].clone()

    def _step(
        self, hidden: Tensor, first: Tensor, numbers: Tensor, floats: Tensor
    ) -> tuple[Tensor, Tensor]:
        text, top_k, *keys = numbers.split(1, 1)
        thresholds = floats.split(1, 1)
        passes = iter(keys)

        def choose(scores: Tensor) -> Tensor:
            rows = _Rows(self._vocab, thresholds, top_k, next(passes))
            return _some(sample_batch(scores, rows))

        return self._completed(hidden, first, text.squeeze(1), choose)

    def _completed(
        self, hidden: Tensor, first: Tensor, text: Tensor, choose: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Codes `[frames, groups]` and the next inputs `[frames, hidden]`."""
        talker, thinker = self._omni.talker, self._omni.thinker
        rest = talker.code_predictor(hidden, talker.embed(first), choose)
        codes = torch.cat([first[:, None], rest], 1)
        return codes, talker.frame_inputs(codes, talker.text_projection(thinker.rows(text)))

    def _sizes(self) -> Sequence[int]:
        sizes = [1]
        while sizes[-1] < self._max_batch:
            sizes.append(min(2 * sizes[-1], self._max_batch))
        return sizes


def _some(codes: Tensor) -> Tensor:
    """Code 0 where the scores are no numbers."""
    return codes.clamp_min_(0)


@dataclass(frozen=True)
class _Rows:
    """What `sample_batch` needs to know, as columns that are on the device already."""

    vocab: int
    thresholds: Sequence[Tensor]
    top_k: Tensor
    keys: Tensor
    are_greedy: bool = False
    cut_by_rank: bool = True
