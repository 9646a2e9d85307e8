"""What a batch of sequences asks of its sampling, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mstar.engine.kernels.staging import pack

if TYPE_CHECKING:
    from mstar.engine.sampling import SamplerState

__all__ = ["SampleRows"]

_SIGN = 1 << 63


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
        values = [
            (p.temperature, p.top_p, p.min_p, s.repetition, s.presence, s.frequency)
            for s in self.states
            for p in (s.params,)
        ]
        return pack(list(zip(*values, strict=True)), torch.float64, self.device)

    @cached_property
    def _ints(self) -> list[Tensor]:
        values = [
            (
                (s.next_key() ^ _SIGN) - _SIGN,  # the int64 with the same bits
                s.params.top_k or self.vocab,
                s.slot,
                s.params.penalises,
            )
            for s in self.states
        ]
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
