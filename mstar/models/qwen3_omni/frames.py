"""Frames of the Talker, for many streams at once: from one first code to the next one.

A frame is completed (15 passes of the code predictor with their draws), the sums of its embeddings
and the text go through the Talker, and the first code of the next frame is drawn. On a GPU all of
it is one captured step: what one replay gives is what the next one takes, and stays there. On a
CPU the parts run one after the other, and codes are drawn row by row on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mstar.engine.captured import Record
from mstar.engine.graphs import DecodeGraphs
from mstar.engine.kernels.counter_noise import key, signed
from mstar.engine.kernels.sample import sample_batch
from mstar.engine.kernels.sample_rows import HeldRows, draw_numbers, thresholds_of
from mstar.engine.kernels.staging import send, to_device
from mstar.engine.lm import LanguageModel
from mstar.engine.paged_context import PagedContext
from mstar.engine.sampler import HostSampler
from mstar.engine.sampling import HostState, SamplerState, SamplingParams
from mstar.engine.spans import Span, Step, Tokens, gather_ids
from mstar.models.qwen3_omni.networks import Omni

__all__ = ["Frame", "FrameJob", "Frames"]

_STREAMS = 256  # that may have penalties before steps have to be captured again
_OWN_INTS = 6  # of a row, before those of the code predictor: text, hold and `draw_numbers`
_OWN_THRESHOLDS = 6  # as many as `thresholds_of` gives


@dataclass(frozen=True, eq=False)
class FrameJob:
    """Inputs of a span of one token: what follows from the step before.

    Args:
        step: of the Talker, with the first code and its normed hidden state `[1, hidden]`. The code
            is not read on a GPU: it stays there.
        text: the token that is to be said with the next frame.
        sampler: of the other codes, of this stream.
        number: of frames before this one.
    """

    step: Step
    text: int
    sampler: HostState
    number: int

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, eq=False)
class Frame:
    """What came of such a span: the codes int64 `[groups]`, and the Talker's next step."""

    codes: Tensor
    following: Step


class Frames:
    """Runs the spans of a Talker, those of frames as well: its `run` is put around that of `lm`.

    Args:
        record: how to capture frames, on a GPU; `None` to run them as they are on a CPU.
    """

    def __init__(self, omni: Omni, lm: LanguageModel, record: Record | None) -> None:
        self._omni, self._lm, self._record = omni, lm, record
        self._run_spans, lm.run = lm.run, self.run
        predictor = omni.talker.code_predictor
        self._passes, self._vocab = len(predictor.lm_head), predictor.config.vocab_size
        self._sampler = HostSampler(self._vocab)
        self._graphs: DecodeGraphs | None = None
        self._tables: Sequence[Tensor] = ()
        if record is not None:
            lm.sampler.reserve(_STREAMS)

    def open(self, params: SamplingParams) -> HostState:
        """The sampler of a new stream."""
        return self._sampler.open(params, ())

    def run(self, spans: list[Span]) -> list[Step | Frame]:
        """A batch of spans of the Talker: of one token with a `FrameJob`, or as any other's."""
        framed = [span for span in spans if isinstance(span.inputs, FrameJob)]
        if not framed:
            return self._run_spans(spans)
        if self._record is None:
            return self._part_by_part(spans, framed)
        # What may fail comes first: the calls of a batch that fails are run again one by one.
        graphs = self._current_graphs()
        graphs.bucket(len(framed))
        rest = [span for span in spans if not isinstance(span.inputs, FrameJob)]
        found = dict(zip(rest, self._run_spans(rest), strict=True)) if rest else {}
        found.update(zip(framed, self._replayed(graphs, framed), strict=True))
        return [found[span] for span in spans]

    def warmup(self) -> None:
        """Capture every batch size."""
        if self._record is not None:
            self._current_graphs().capture()

    def _part_by_part(self, spans: list[Span], framed: list[Span]) -> list[Step | Frame]:
        jobs = [span.inputs for span in framed]
        states = [job.sampler for job in jobs]
        greedy = all(state.params.temperature == 0 for state in states)
        for job in jobs:
            job.sampler.drawn = job.number * self._passes

        def choose(scores: Tensor) -> Tensor:
            return scores.argmax(-1) if greedy else _some(self._sampler.sample(scores, states))

        hidden, first = self._before(jobs)
        text = to_device([job.text for job in jobs], torch.int64, hidden.device)
        codes, inputs = self._completed(hidden, first, text, choose)
        fed = dict(zip(framed, inputs.split(1), strict=True))
        steps = self._run_spans([replace(s, inputs=fed[s]) if s in fed else s for s in spans])
        said = dict(zip(framed, codes, strict=True))
        pairs = zip(spans, steps, strict=True)
        return [Frame(said[span], step) if span in said else step for span, step in pairs]

    def _replayed(self, graphs: DecodeGraphs, spans: list[Span]) -> list[Frame]:
        hidden, first = self._before([span.inputs for span in spans])
        outputs = graphs.run(
            hidden,
            [span.kv.length + span.kv.offset for span in spans],
            [span.kv.length + 1 for span in spans],
            [span.kv.pages for span in spans],
            first,
            self._numbers(spans, graphs.bucket(len(spans))),
        )
        hidden, chosen, codes = (output.clone() for output in outputs)
        tokens, frames = Tokens(chosen), []
        for row, span in enumerate(spans):
            span.sampler.drawn += 1
            span.kv.wrote(1, None)
            frames.append(Frame(codes[row], Step(tokens, row, hidden[row : row + 1])))
        self._lm.pool.released()
        return frames

    def _before(self, jobs: list[FrameJob]) -> tuple[Tensor, Tensor]:
        """Hidden states `[frames, hidden]` and first codes `[frames]`."""
        hidden = torch.cat([job.step.hidden for job in jobs])
        return hidden, gather_ids([job.step for job in jobs], hidden.device)

    # -- the captured step -------------------------------------------------------------------

    def _current_graphs(self) -> DecodeGraphs:
        """They read the tables of penalties where these were when they were captured."""
        lm = self._lm
        if self._tables is not lm.sampler.tables:
            self._tables = lm.sampler.tables
            self._graphs = DecodeGraphs(
                self._step,
                lm.pool,
                lm.buckets,
                lm.pool.capacity,
                self._record,
                width=self._omni.talker.config.text.hidden_size,
                fractions=True,
                more=self._blank,
            )
        return self._graphs

    def _step(
        self,
        hidden: Tensor,
        positions: Tensor,
        context: PagedContext,
        first: Tensor,
        numbers: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, chosen first codes (see `Sampler.sample`), and codes of the frames before.

        Args:
            positions: of the Talker's next inputs.
            numbers: int64 `[columns, frames]`, see `_row`.
        """
        talker, ends = self._omni.talker, _OWN_INTS + 1 + self._passes
        text, hold, *own = numbers[:_OWN_INTS].unbind()
        top_k, *keys = numbers[_OWN_INTS:ends].unbind()
        thresholds = numbers[ends:].view(torch.float64).unbind()
        draws = iter(keys)

        def choose(scores: Tensor) -> Tensor:
            rows = HeldRows(self._vocab, thresholds[_OWN_THRESHOLDS:], (next(draws), top_k))
            return _some(sample_batch(scores, rows))

        codes, inputs = self._completed(hidden, first, text, choose)
        hidden = talker(inputs, positions, context)
        logits = talker.logits(hidden)
        logits[:, talker.config.codec_eos_token_id].masked_fill_(hold != 0, -torch.inf)
        rows = HeldRows(talker.vocab_size, thresholds[:_OWN_THRESHOLDS], own)
        return hidden, self._lm.sampler.draw(logits, rows), codes

    def _completed(
        self, hidden: Tensor, first: Tensor, text: Tensor, choose: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Codes `[frames, groups]` and the next inputs `[frames, hidden]`."""
        talker, thinker = self._omni.talker, self._omni.thinker
        rest = talker.code_predictor(hidden, talker.embed(first), choose)
        codes = torch.cat([first[:, None], rest], 1)
        return codes, talker.frame_inputs(codes, talker.text_projection(thinker.rows(text)))

    def _numbers(self, spans: Sequence[Span], size: int) -> Tensor:
        """Columns int64 `[columns, size]`; rows beyond the spans are greedy, and count nothing."""
        nobody = SamplerState(SamplingParams(temperature=0.0), 0)
        rows = [
            self._row(job.text, span.sampler, job.sampler, job.number)
            for span in spans
            for job in (span.inputs,)
        ]
        rows += [self._row(0, nobody, nobody, 0)] * (size - len(rows))
        ints, floats = zip(*rows, strict=True)
        bits = np.array(floats, dtype=np.float64).view(np.int64)
        columns = np.concatenate([np.array(ints, dtype=np.int64), bits], 1).T
        return send(torch.from_numpy(np.ascontiguousarray(columns)), self._lm.device)

    def _row(
        self, text: int, own: SamplerState, other: SamplerState, number: int
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """What a frame's step is told: integers, and numbers that are given as their bits."""
        first, params = number * self._passes, other.params
        keys = [signed(key(params.seed, first + n)) for n in range(self._passes)]
        draw = draw_numbers(own, self._omni.talker.vocab_size)
        ints = text, int(not own.may_stop), *draw, params.top_k or self._vocab, *keys
        return ints, (*thresholds_of(own), *thresholds_of(other)[:3])

    def _blank(self, size: int) -> tuple[Tensor, Tensor]:
        """First codes and numbers of nobody. Columns begin at multiples of 16 bytes."""
        numbers = self._numbers((), size)
        held = numbers.new_zeros(len(numbers), size + size % 2)[:, :size]
        return numbers.new_zeros(size), held.copy_(numbers)


def _some(codes: Tensor) -> Tensor:
    """Code 0 where the scores are no numbers."""
    return codes.clamp_min_(0)
