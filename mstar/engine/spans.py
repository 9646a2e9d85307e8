"""Spans: what a decoder network is given, and what comes of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.engine.kernels.staging import pack
from mstar.engine.kvcache import KVCache
from mstar.engine.logprobs import LogProbs, TokenScores
from mstar.engine.sampling import SamplerState
from mstar.errors import RequestFailed

__all__ = ["Span", "Step", "Tokens", "gather_ids"]


@dataclass(slots=True, eq=False)
class Span:
    """New tokens of one sequence.

    Args:
        kv: the sequence.
        inputs: token ids, embeddings `[count, hidden]`, or the step whose token is the input; or
            what a model's own `run` makes one of these of.
        count: number of tokens.
        positions: rotary positions, or a float32 tensor `[3, count]` of three axes; those after the
            cached tokens, shifted by `kv.offset`, if left out.
        causal: whether tokens of the span see only those before them.
        sampler: choose a token after the span's last one.
        lead: how many of the first tokens belong to the network's second expert (a Mixture of
            Transformers, Liang et al. 2024, section 2); such a span is not causal.
        hidden: return the hidden states of the span, which has no lead.
        content: what the tokens are, for the prefix cache (see `KVCache.reuse`).
    """

    kv: KVCache
    inputs: Sequence[int] | Tensor | Step
    count: int
    positions: Sequence[int] | Tensor | None = None
    causal: bool = True
    sampler: SamplerState | None = None
    lead: int = 0
    hidden: bool = False
    content: Sequence[int] | None = None

    @property
    def is_embedded(self) -> bool:
        """Whether the inputs are embeddings."""
        return isinstance(self.inputs, Tensor)

    def check(self) -> None:
        """Refuse what would shift the tokens of others in the batch.

        Raises:
            ValueError: the parts are not of the same length.
        """
        if isinstance(self.inputs, Step):
            count = int(self.inputs.tokens is not None)
        else:
            count = len(self.inputs)
        if not 0 < count == self.count:
            raise ValueError(f"a span of {self.count} tokens needs as many inputs and got {count}")
        if self.lead and (self.causal or self.hidden or not 0 < self.lead <= count):
            raise ValueError(
                f"lead={self.lead}: the span has {count} tokens, causal={self.causal}, "
                f"hidden={self.hidden}"
            )
        if self.positions is not None and _length(self.positions) != count:
            raise ValueError(f"{_length(self.positions)} positions for a span of {count} tokens")
        if self.content is not None and len(array("q", self.content)) != count:
            raise ValueError(f"content of {len(self.content)} for a span of {count} tokens")


def _length(positions: Sequence[int] | Tensor) -> int:
    return positions.shape[-1] if isinstance(positions, Tensor) else len(positions)


class Tokens:
    """The tokens that one batch chose. On a GPU they are read without stopping it."""

    def __init__(self, chosen: Tensor) -> None:
        self.on_device = chosen.clamp_min(0) if chosen.is_cuda else chosen
        self._values: list[int] | None = None
        self._event: torch.cuda.Event | None = None
        if chosen.is_cuda:
            self._host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            self._host.copy_(chosen, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = chosen.tolist()

    def __getitem__(self, row: int) -> int:
        if self._values is None:
            self._event.synchronize()
            self._values = self._host.tolist()
        return self._values[row]


class Step:
    """What came of a span: the chosen token, its scores and hidden states, each if asked for."""

    __slots__ = ("_scores", "hidden", "row", "tokens")

    def __init__(
        self,
        tokens: Tokens | None,
        row: int,
        hidden: Tensor | None,
        scores: tuple[LogProbs, int] | None = None,
    ) -> None:
        self.tokens = tokens
        self.row = row
        self.hidden = hidden
        self._scores = scores

    @property
    def scores(self) -> TokenScores:
        """How likely the chosen token was; there if its parameters have `logprobs`."""
        scores, row = self._scores
        return scores.of(row, self.token)

    @property
    def token(self) -> int:
        """The chosen token. On a GPU this waits until the step has run.

        Raises:
            RequestFailed: the network's scores allow no token.
        """
        if self.tokens is None:
            raise RuntimeError("no token was chosen: the span had no sampler")
        token = self.tokens[self.row]
        if token < 0:
            raise RequestFailed("no token can be chosen: the scores hold NaN, or none is finite")
        return token


def gather_ids(inputs: Sequence[Sequence[int] | Step], device: torch.device) -> Tensor:
    """The ids `[tokens]` of several spans on a device, without reading tokens that lie there.

    Where the rows of a single batch of tokens follow each other, as they do while the same
    sequences are decoded, they are taken as they are.
    """
    ids: list[int] = []  # that the host knows
    order: list[int] = []  # of the result, in the ids and then the tokens of each batch
    starts: dict[Tokens, int] = {}
    total = sum(0 if isinstance(part, Step) else len(part) for part in inputs)
    for part in inputs:
        if isinstance(part, Step):
            if part.tokens not in starts:
                starts[part.tokens] = total
                total += len(part.tokens.on_device)
            order.append(starts[part.tokens] + part.row)
        else:
            order += range(len(ids), len(ids) + len(part))
            ids += part
    chosen = [tokens.on_device for tokens in starts]
    if not ids and len(chosen) == 1 and order == list(range(order[0], order[0] + len(order))):
        return chosen[0][order[0] : order[0] + len(order)]
    known, places = pack((ids, order), torch.int64, device)
    return torch.cat([known, *chosen])[places] if chosen else known
