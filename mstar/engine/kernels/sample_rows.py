"""What a batch of sequences asks of its sampling, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mstar.engine.kernels.counter_noise import signed
from mstar.engine.kernels.staging import pack

if TYPE_CHECKING:
    from mstar.engine.sampling import SamplerState

__all__ = ["HeldRows", "SampleRows", "draw_numbers", "thresholds_of"]


def thresholds_of(state: SamplerState) -> tuple[float, ...]:
    """Temperature, top-p, min-p; repetition, presence and frequency penalties."""
    p = state.params
    return p.temperature, p.top_p, p.min_p, state.repetition, state.presence, state.frequency


def draw_numbers(state: SamplerState, vocab: int) -> tuple[int, ...]:
    """Key of the next draw (as an int64), top-k; row of the tables, and 1 if the token is to be
    counted there."""
    p = state.params
    return signed(state.next_key()), p.top_k or vocab, state.slot, int(p.penalises)


class SampleRows:
    """The parameters of a batch as columns on its device, in two copies, and only if asked for."""

    def __init__(self, states: Sequence[SamplerState], vocab: int, device: torch.device) -> None:
        params = [state.params for state in states]
        self.states = states
        self.vocab = vocab
        self.device = device
        self.are_greedy = all(p.temperature == 0.0 for p in params)
        self.penalise = any(p.penalises for p in params)
        self.cut_by_rank = any(0 < p.top_k < vocab or p.top_p < 1.0 for p in params)

    @cached_property
    def _floats(self) -> list[Tensor]:
        values = [thresholds_of(state) for state in self.states]
        return pack(list(zip(*values, strict=True)), torch.float64, self.device)

    @cached_property
    def _ints(self) -> list[Tensor]:
        values = [draw_numbers(state, self.vocab) for state in self.states]
        return pack(list(zip(*values, strict=True)), torch.int64, self.device)

    @property
    def thresholds(self) -> tuple[Tensor, ...]:
        """Temperature, top-p, min-p, float64 `[batch, 1]`."""
        return tuple(column.unsqueeze(1) for column in self._floats[:3])

    @property
    def penalty_columns(self) -> list[Tensor]:
        """Repetition, presence and frequency penalties, float64 `[batch]`."""
        return self._floats[3:]

    @property
    def penalties(self) -> tuple[Tensor, ...]:
        """The same, float32 `[batch, 1]`."""
        return tuple(column.float().unsqueeze(1) for column in self.penalty_columns)

    @property
    def keys(self) -> Tensor:
        """Keys of the draws, int64 `[batch, 1]`, modulo 2^64."""
        return self._ints[0].unsqueeze(1)

    @property
    def top_k(self) -> Tensor:
        """Int64 `[batch, 1]`."""
        return self._ints[1].unsqueeze(1)

    @property
    def slots(self) -> Tensor:
        """Rows of the sampler's tables, int64 `[batch]`."""
        return self._ints[2]

    @property
    def counted(self) -> Tensor:
        """1 for the rows that have penalties, int64 `[batch]`."""
        return self._ints[3]


class HeldRows(SampleRows):
    """The same of columns that are on the device already, as where a step is captured: it has to
    serve all parameters.

    Args:
        floats: columns `[batch]` of `thresholds_of`; the penalties only if there are any.
        ints: columns `[batch]` of `draw_numbers`, likewise.
    """

    def __init__(self, vocab: int, floats: Sequence[Tensor], ints: Sequence[Tensor]) -> None:
        self.vocab = vocab
        self.are_greedy, self.cut_by_rank, self.penalise = False, True, len(ints) > 2
        self._floats, self._ints = floats, ints
