"""Sampling of tokens: penalties, temperature, top-k, top-p, min-p and the draw.

`sample_row` serves one row on the CPU and never sorts the whole vocabulary. `sample_batch` serves
a batch on a device with dense tensor operations; it is also what `sample_row` is tested against.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mstar.engine.sampling import HostState, SamplerState

__all__ = ["bias", "penalise", "sample_batch", "sample_row"]

# Less likely than exp(-40) times the most likely token: a million of them weigh less than 1e-11.
_NEGLIGIBLE = 40.0
_LOWEST = float(np.finfo(np.float32).min)
_SORTABLE = 4096
_BUCKETS = 2048
_BLOCK = 1024


def sample_row(logits: np.ndarray, state: HostState) -> int:
    """The next token of one sequence; -1 if a logit is NaN or +inf, or none is finite.

    Exact in float64, but for tokens that are less likely than exp(-40) times the most likely one:
    they are never drawn. Of equally likely tokens top-k and top-p prefer those with lower ids.

    Args:
        logits: float32 `[vocab]`; it is overwritten.
    """
    params = state.params
    _penalise_row(logits, state)
    best = int(logits.argmax())
    top = float(logits[best])
    if not math.isfinite(top):
        return -1
    if params.temperature == 0.0:
        return best
    likely = logits >= max(top - _NEGLIGIBLE * params.temperature, _LOWEST)
    ids, values = None, logits
    if np.count_nonzero(likely) < len(logits) // 4:
        ids = np.flatnonzero(likely)
        values = logits[ids]
    if 0 < params.top_k < len(values):
        largest = _largest(values, params.top_k)
        ids = largest if ids is None else ids[largest]
        values = logits[ids]
    weights = _scratch.floats(len(values))
    np.subtract(values, top, out=weights)
    weights /= params.temperature
    if params.top_p < 1.0:
        mask = _nucleus(values, weights, params.top_p)
        weights *= mask
    else:
        np.exp(weights, out=weights)
    if params.min_p > 0.0:
        weights *= weights >= params.min_p
    place = _draw(weights, state.next_uniform())
    return place if ids is None else int(ids[place])


class _Scratch(threading.local):
    """Arrays that are used again: fresh memory of that size costs more than what is done in it."""

    def __init__(self) -> None:
        self._floats = np.empty(0, dtype=np.float64)
        self._ints = np.empty(0, dtype=np.int64)

    def floats(self, size: int) -> np.ndarray:
        """Uninitialised float64 `[size]`."""
        if size > len(self._floats):
            self._floats = np.empty(size, dtype=np.float64)
        return self._floats[:size]

    def ints(self, size: int) -> np.ndarray:
        """Uninitialised int64 `[size]`."""
        if size > len(self._ints):
            self._ints = np.empty(size, dtype=np.int64)
        return self._ints[:size]


_scratch = _Scratch()


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices, ascending, of the `count` largest values; of equal ones the first."""
    least = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(values: np.ndarray, weights: np.ndarray, top_p: float) -> np.ndarray:
    """A mask of the fewest largest values whose weights reach `top_p` of the sum.

    Args:
        values: float32 `[n]`.
        weights: float64 `[n]`, logarithms (at most 0) on entry, weights on return.
    """
    if len(values) <= _SORTABLE:
        np.exp(weights, out=weights)
        mask, rest, reached = np.zeros(len(values), dtype=bool), np.arange(len(values)), 0.0
        goal = top_p * weights.sum()
    else:
        # Only the bucket of equal depth in which the goal is reached has to be sorted.
        np.maximum(weights, -1000.0, out=weights)  # still nothing, but fits into an integer
        bucket = _scratch.ints(len(values))
        scale = (1 - _BUCKETS) / max(-max(float(weights.min()), -_NEGLIGIBLE), 1e-12)
        np.multiply(weights, scale, out=bucket, casting="unsafe")
        np.minimum(bucket, _BUCKETS - 1, out=bucket)
        np.exp(weights, out=weights)
        mass = np.cumsum(np.bincount(bucket, weights, _BUCKETS))
        goal = top_p * mass[-1]
        edge = int(np.searchsorted(mass, goal))
        mask, rest = bucket < edge, np.flatnonzero(bucket == edge)
        reached = float(mass[edge - 1]) if edge else 0.0
    order = rest[np.argsort(-values[rest], kind="stable")]
    before = reached + np.cumsum(weights[order]) - weights[order]
    count = int(np.searchsorted(before, goal))
    mask[order[: count if reached else max(count, 1)]] = True
    return mask


def _draw(weights: np.ndarray, uniform: float) -> int:
    """The index at which the running sum of the weights exceeds `uniform` times their sum."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)))
    goal = uniform * sums[-1]
    block = min(int(np.searchsorted(sums, goal, side="right")), len(sums) - 1)
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    before = sums[block - 1] if block else 0.0
    place = int(np.searchsorted(before + np.cumsum(inside), goal, side="right"))
    if place == len(inside):  # by rounding
        place = int(np.flatnonzero(inside)[-1])
    return block * _BLOCK + place


def _penalise_row(logits: np.ndarray, state: HostState) -> None:
    params = state.params
    if params.repetition_penalty != 1.0:
        seen = state.seen
        values = logits[seen]
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(state.output, return_counts=True)
        logits[ids] -= np.float32(params.presence_penalty) + counts.astype(np.float32) * np.float32(
            params.frequency_penalty
        )
    if len(state.bias_ids):
        logits[state.bias_ids] += state.bias
    if len(state.stop_ids) and not state.may_stop:
        logits[state.stop_ids] = -np.inf


def _column(values: list, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)


def penalise(
    logits: Tensor, in_prompt: Tensor, in_output: Tensor, states: Sequence[SamplerState]
) -> Tensor:
    """`logits` after repetition, presence and frequency penalties.

    Args:
        logits: float32 `[batch, vocab]`.
        in_prompt: bool `[batch, vocab]`, tokens of the prompt.
        in_output: int `[batch, vocab]`, how often a token was chosen.
    """
    device = logits.device
    repetition = _column([s.params.repetition_penalty for s in states], device)
    penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_prompt | (in_output > 0), penalised, logits)
    presence = _column([s.params.presence_penalty for s in states], device)
    frequency = _column([s.params.frequency_penalty for s in states], device)
    return logits - (presence * (in_output > 0) + frequency * in_output)


def bias(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """`logits` `[batch, vocab]` with logit biases added, and stop tokens out while it is early."""
    for row, state in zip(logits, states, strict=True):
        if len(state.bias_ids):
            ids = torch.as_tensor(state.bias_ids, device=row.device)
            row[ids] += torch.as_tensor(state.bias, device=row.device)
        if len(state.stop_ids) and not state.may_stop:
            row[torch.as_tensor(state.stop_ids, device=row.device)] = -torch.inf
    return logits


def sample_batch(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """The next token of every row, int64 `[batch]`, from biased logits, float32 `[batch, vocab]`.

    As for `sample_row`, which takes the same steps; it does not leave out what is negligible.
    """
    device, vocab = logits.device, logits.shape[-1]
    top, greedy = logits.max(-1, keepdim=True)
    finite = top.isfinite()
    if all(s.params.temperature == 0.0 for s in states):
        return torch.where(finite, greedy, -1).squeeze(1)
    ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    double = torch.float64
    temperature = _column([s.params.temperature or 1.0 for s in states], device, double)
    weights = ((ordered.double() - top) / temperature).exp()
    top_k = _column([s.params.top_k or vocab for s in states], device, torch.int64)
    weights = weights.masked_fill(torch.arange(vocab, device=device) >= top_k, 0.0)
    sums = weights.cumsum(-1)
    top_p = _column([s.params.top_p for s in states], device, double)
    keep = (sums - weights < top_p * sums[:, -1:]) | (top_p >= 1.0)
    keep[:, 0] = True
    keep &= weights >= _column([s.params.min_p for s in states], device, double)
    # Back in the order of ids, so that the draw does not depend on how ties were sorted.
    weights = torch.zeros_like(weights).scatter_(1, ids, weights * keep)
    sums = weights.cumsum(-1)
    draws = _column([s.next_uniform() for s in states], device, double)
    drawn = torch.searchsorted(sums, draws * sums[:, -1:], right=True)
    last = vocab - 1 - (weights.flip(-1) > 0).to(torch.uint8).argmax(-1, keepdim=True)
    is_greedy = _column([s.params.temperature == 0.0 for s in states], device, torch.bool)
    tokens = torch.where(is_greedy, greedy, torch.minimum(drawn, last))
    return torch.where(finite, tokens, -1).squeeze(1)
