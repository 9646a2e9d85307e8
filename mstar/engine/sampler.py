"""The sampler of a network: chooses the next tokens of a batch of sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.dispatch import use_triton
from mstar.engine.kernels.sample import (
    bias,
    is_biased,
    penalise,
    sample_row,
    sample_torch,
)
from mstar.engine.kernels.sample_fused import sample_triton
from mstar.engine.kernels.sample_rows import SampleRows
from mstar.engine.kernels.staging import to_device
from mstar.engine.sampling import DeviceState, HostState, SamplerState, SamplingParams

__all__ = ["DeviceSampler", "HostSampler", "Sampler", "sampler_for"]


class Sampler(Protocol):
    """Chooses the next tokens of a batch of sequences."""

    def open(self, params: SamplingParams, prompt: Sequence[int]) -> SamplerState:
        """The state of a new sequence."""

    def close(self, state: SamplerState) -> None:
        """The sequence has ended."""

    def warmup(self) -> None:
        """Run once whatever is compiled when it is first run."""

    def sample(self, logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
        """The next token of every row, int64 `[batch]`, on the device of `logits`.

        It is -1 where none can be chosen: the logits of the row hold NaN, or none is finite.

        Args:
            logits: float32 `[batch, vocab]`; it is overwritten.
        """


class HostSampler:
    """Sampling on the CPU, row by row, without ever sorting a vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def open(self, params: SamplingParams, prompt: Sequence[int]) -> HostState:
        """The state of a new sequence."""
        return HostState(params, prompt, self.vocab_size)

    def close(self, state: SamplerState) -> None:
        """The sequence has ended."""

    def warmup(self) -> None:
        """Nothing here is compiled."""

    def sample(self, logits: Tensor, states: Sequence[HostState]) -> Tensor:
        """See `Sampler.sample`."""
        tokens = [sample_row(row, s) for row, s in zip(logits.numpy(), states, strict=True)]
        for token, state in zip(tokens, states, strict=True):
            state.push(token)
        return torch.tensor(tokens)


class DeviceSampler:
    """Sampling with dense operations on the device; the host never waits for a token.

    Which tokens are in the prompt of each sequence, and how often in its output, is kept in two
    `tables` `[slots, vocab]`. New ones take their place when more sequences use penalties at a time
    than there is room for.
    """

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.tables = (
            torch.zeros(1, vocab_size, dtype=torch.bool, device=device),
            torch.zeros(1, vocab_size, dtype=torch.int32, device=device),
        )
        self._free: list[int] = []  # row 0 stays empty: it serves whoever has no penalties

    def open(self, params: SamplingParams, prompt: Sequence[int]) -> DeviceState:
        """The state of a new sequence."""
        state = DeviceState(params, self.vocab_size, self.device)
        if params.penalises:
            if not self._free:
                self.reserve(max(8, len(self.tables[0])))
            ids = to_device(prompt, torch.int64, self.device)
            slot = self._free[-1]
            in_prompt, in_output = self.tables
            in_output[slot].zero_()
            in_prompt[slot].zero_().index_fill_(0, ids, True)
            state.slot = self._free.pop()
        return state

    def close(self, state: DeviceState) -> None:
        """The sequence has ended."""
        if state.slot > 0:
            self._free.append(state.slot)
        state.slot = -1

    def warmup(self) -> None:
        """See `Sampler.warmup`: greedy or not, cut or not, with penalties or not."""
        logits = torch.zeros(1, self.vocab_size, device=self.device)
        for options in ({"temperature": 0.0}, {}, {"top_k": 1}):
            for penalty in (1.0, 2.0):
                state = self.open(SamplingParams(**options, repetition_penalty=penalty), ())
                self.sample(logits.clone(), [state])
                self.close(state)

    def sample(self, logits: Tensor, states: Sequence[DeviceState]) -> Tensor:
        """See `Sampler.sample`."""
        rows = SampleRows(states, self.vocab_size, logits.device)
        adjust = partial(bias, states=states) if any(map(is_biased, states)) else None
        tokens = self.draw(logits, rows, adjust)
        for state in states:
            state.drawn += 1
        return tokens

    def draw(
        self,
        logits: Tensor,
        rows: SampleRows,
        adjust: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """The part of `sample` on the device. With `HeldRows` it may be captured: it reads and
        writes `tables`.

        Args:
            adjust: changes the logits in place between the penalties and all else.
        """
        tables = self.tables if rows.penalise else None
        if use_triton(logits):
            return sample_triton(logits, rows, tables, adjust)
        if tables is not None:
            in_prompt, in_output = tables
            logits = penalise(logits, in_prompt[rows.slots], in_output[rows.slots], rows)
        if adjust is not None:
            adjust(logits)
        tokens = sample_torch(logits, rows)
        if tables is not None:
            counted = rows.counted.to(torch.int32)
            in_output.index_put_((rows.slots, tokens), counted, accumulate=True)
        return tokens

    def reserve(self, more: int) -> None:
        """Room for penalties of more sequences, in new `tables`."""
        rows = len(self.tables[0])
        self.tables = tuple(F.pad(table, (0, 0, 0, more)) for table in self.tables)
        self._free += range(rows + more - 1, rows - 1, -1)


def sampler_for(device: torch.device, vocab_size: int) -> Sampler:
    """The sampler that suits a device."""
    return HostSampler(vocab_size) if device.type == "cpu" else DeviceSampler(vocab_size, device)
