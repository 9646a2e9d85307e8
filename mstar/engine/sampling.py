"""Choosing the next token: the parameters, and what is remembered of each sequence.

The order is repetition penalty, presence and frequency penalties, logit bias, temperature, top-k,
top-p, min-p, draw. Draws are counter based: number `n` of a sequence is a hash of its seed and `n`
(SplitMix64; Steele, Lea and Flood 2014, section 3), so it does not depend on what else is in the
batch, and no generator state has to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["DeviceState", "HostState", "SamplerState", "SamplingParams", "mix", "uniform"]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


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

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens matter."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def mix(value: int) -> int:
    """The 64-bit finaliser of SplitMix64: a bijection that scatters its input."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, counter: int) -> float:
    """Draw number `counter` of the stream `seed`, in [0, 1) with 53 random bits."""
    return (mix(mix(seed) + _GAMMA * (counter + 1)) >> 11) * 2.0**-53


class SamplerState:
    """What the sampler remembers of one sequence. `drawn` counts its tokens so far."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self.params = params
        self.drawn = 0
        bias = {t: b for t, b in params.logit_bias.items() if 0 <= t < vocab_size}
        self.bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self.bias = np.fromiter(bias.values(), np.float32, len(bias))
        stops = sorted(t for t in params.stop_ids if 0 <= t < vocab_size)
        self.stop_ids = np.array(stops, np.int64)

    @property
    def may_stop(self) -> bool:
        """Whether stop tokens may be chosen now."""
        return self.drawn >= self.params.min_tokens

    def next_uniform(self) -> float:
        """The draw for the next token."""
        return uniform(self.params.seed, self.drawn)


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
    """A state whose earlier tokens are row `slot` of the sampler's tables on the device."""

    slot = -1
