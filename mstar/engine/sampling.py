"""Choosing the next token: the parameters, and what is remembered of each sequence.

The order is repetition penalty, presence and frequency penalties, logit bias, temperature, top-k,
top-p, min-p, draw. The noise of a draw is a hash of the seed, the number of the draw and the token
id (see `kernels.counter_noise`), so it does not depend on what else is in the batch, and no
generator state has to be kept. What the batch does change is the last bits of the logits. Then
another token is drawn only where two of them come out of the noise equal to those bits (see
`kernels.sample`), or where one is on the very border of top-k, top-p or min-p: that is rare, but
not impossible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mstar.engine.kernels.counter_noise import key, mix
from mstar.engine.kernels.staging import to_device

__all__ = ["DeviceState", "HostState", "SamplerState", "SamplingParams", "mix"]

# Penalties and biases beyond these do all that such a thing can do, and float32 stays finite.
_STRONGEST_PENALTY = 2.0**64
_STRONGEST_BIAS = 1e30


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one sequence are chosen and when it ends.

    Args:
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach p.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of every token in the
            prompt or the output (Keskar et al. 2019, section 4.1).
        presence_penalty: subtracted from the logit of every token in the output.
        frequency_penalty: subtracted once for each time that the token is in the output.
        logit_bias: added to the logits of these token ids.
        max_tokens: end after so many tokens.
        min_tokens: `stop_ids` cannot be chosen before so many tokens.
        stop_ids: tokens that end the sequence; they are not part of the output.
        seed: of the draws.
        logprobs: tell how likely every token was, and so many of the likeliest; `None` for neither.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 4096
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens matter."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class SamplerState:
    """What the sampler remembers of one sequence. `drawn` counts its tokens so far.

    `repetition`, `presence`, `frequency` and `bias` are the parameters, but not so strong that
    logits overflow.
    """

    slot = 0  # its row in the tables of a `DeviceSampler`; -1 once closed

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self.params = params
        self.drawn = 0
        self.repetition = min(
            max(params.repetition_penalty, 1 / _STRONGEST_PENALTY), _STRONGEST_PENALTY
        )
        self.presence = _bounded(params.presence_penalty)
        self.frequency = _bounded(params.frequency_penalty)
        bias = {t: _bounded(b) for t, b in params.logit_bias.items() if 0 <= t < vocab_size}
        self.bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self.bias = np.fromiter(bias.values(), np.float32, len(bias))
        stops = sorted(t for t in params.stop_ids if 0 <= t < vocab_size)
        self.stop_ids = np.array(stops, np.int64)

    @property
    def may_stop(self) -> bool:
        """Whether stop tokens may be chosen now."""
        return self.drawn >= self.params.min_tokens

    def next_key(self) -> int:
        """What the noise of the next token's draw is keyed with, in 0 .. 2^64 - 1."""
        return key(self.params.seed, self.drawn)


def _bounded(value: float) -> float:
    return min(max(value, -_STRONGEST_BIAS), _STRONGEST_BIAS)


class HostState(SamplerState):
    """A state whose earlier tokens are kept on the host."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        super().__init__(params, vocab_size)
        self._prompt = len(prompt) if params.penalises else 0
        self._count = self._prompt
        self._history = np.empty(self._prompt + 64, dtype=np.int64)
        if self._prompt:
            self._history[: self._prompt] = prompt

    @property
    def seen(self) -> np.ndarray:
        """Ids of the prompt and the output, `[n]`, in order."""
        return self._history[: self._count]

    @property
    def output(self) -> np.ndarray:
        """Ids of the output, `[n]`, in order."""
        return self._history[self._prompt : self._count]

    def push(self, token: int) -> None:
        """A token was chosen."""
        self.drawn += 1
        if self.params.penalises:
            if self._count == len(self._history):
                self._history = np.concatenate([self._history, np.empty_like(self._history)])
            self._history[self._count] = token
            self._count += 1


class DeviceState(SamplerState):
    """A state whose earlier tokens are row `slot` of the sampler's tables on the device.

    What stays the same is there, too: biases, and ids of tokens that are biased or that stop.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device) -> None:
        super().__init__(params, vocab_size)
        self.bias_places: Tensor | None = None
        self.bias_values: Tensor | None = None
        self.stop_places: Tensor | None = None
        if len(self.bias_ids):
            self.bias_places = to_device(self.bias_ids, torch.int64, device)
            self.bias_values = to_device(self.bias, torch.float32, device)
        if len(self.stop_ids) and not self.may_stop:
            self.stop_places = to_device(self.stop_ids, torch.int64, device)
