"""Sampling of tokens: penalties, temperature, top-k, top-p, min-p and the draw.

`sample_row` serves one row on the CPU and never sorts the whole vocabulary. `sample_batch` serves
a batch on a device with dense tensor operations; it is also what `sample_row` is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mstar.engine.sampling import HostState, SamplerState

__all__ = ["bias", "penalise", "sample_batch", "sample_row"]

# How far below the top logit, in units of temperature, to look for the nucleus first.
_DEPTHS = (6.0, 14.0)
_SORTABLE = 2048
_BUCKETS = 4096


def sample_row(logits: np.ndarray, state: HostState) -> int:
    """The next token of one sequence.

    Args:
        logits: float32 `[vocab]`; it is overwritten.
    """
    params = state.params
    _penalise_row(logits, state)
    if params.temperature == 0.0:
        return int(logits.argmax())
    depth = logits
    np.subtract(logits.max(), logits, out=depth)
    depth *= np.float32(1.0 / params.temperature)
    weights = np.exp(-depth)
    ids = None
    if 0 < params.top_k < len(weights):
        ids = np.sort(np.argpartition(depth, params.top_k - 1)[: params.top_k])
    if params.top_p < 1.0:
        ids = _nucleus(depth, weights, params.top_p, ids)
    if ids is not None:
        weights = weights[ids]
    if params.min_p > 0.0:
        weights = np.where(weights >= np.float32(params.min_p), weights, 0)  # the top one is 1
    sums = np.cumsum(weights, dtype=np.float64)
    place = np.searchsorted(sums, state.next_uniform() * sums[-1], side="right")
    place = min(int(place), len(weights) - 1)
    return int(place if ids is None else ids[place])


def _nucleus(
    depth: np.ndarray, weights: np.ndarray, top_p: float, among: np.ndarray | None
) -> np.ndarray:
    """Ids, ascending, of the fewest largest weights that reach `top_p` of the sum.

    Args:
        depth: float32 `[vocab]`, distance to the top logit in units of temperature.
        weights: float32 `[vocab]`, `exp(-depth)`.
        among: only these ids count; all if None.
    """
    if among is not None:
        goal = top_p * float(weights[among].sum(dtype=np.float64))
        return _fewest(among, depth, weights, goal)
    goal = top_p * float(weights.sum(dtype=np.float64))
    for limit in _DEPTHS:
        ids = np.flatnonzero(depth < limit)
        if float(weights[ids].sum(dtype=np.float64)) >= goal:
            return _fewest(ids, depth, weights, goal)
    return _fewest(np.arange(len(weights)), depth, weights, goal)


def _fewest(ids: np.ndarray, depth: np.ndarray, weights: np.ndarray, goal: float) -> np.ndarray:
    """Those of `ids`, ascending, with the largest weights, as many as it takes to reach `goal`."""
    certain, reached = ids[:0], 0.0
    if len(ids) > _SORTABLE:
        # Only the bucket of depths in which the goal is reached has to be sorted.
        deep = depth[ids]
        scale = np.float32((_BUCKETS - 1) / max(float(min(deep.max(), 60.0)), 1e-6))
        bucket = np.minimum(deep * scale, _BUCKETS - 1).astype(np.int32)
        mass = np.cumsum(np.bincount(bucket, weights[ids], _BUCKETS))
        edge = int(np.searchsorted(mass, goal))
        certain, ids = ids[bucket < edge], ids[bucket == edge]
        reached = float(mass[edge - 1]) if edge else 0.0
    order = ids[np.argsort(depth[ids], kind="stable")]
    before = reached + np.cumsum(weights[order], dtype=np.float64) - weights[order]
    count = max(int(np.searchsorted(before, goal)), 0 if len(certain) else 1)
    return np.sort(np.concatenate([certain, order[:count]]))


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
    return logits - presence * (in_output > 0) - frequency * in_output


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
    """The next token of every row, int64 `[batch]`, from biased logits, float32 `[batch, vocab]`."""
    device, vocab = logits.device, logits.shape[-1]
    greedy = logits.argmax(-1)
    if all(s.params.temperature == 0.0 for s in states):
        return greedy
    temperature = _column([s.params.temperature or 1.0 for s in states], device)
    ordered, ids = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)
    top_k = _column([s.params.top_k or vocab for s in states], device, torch.int64)
    ordered = ordered.masked_fill(torch.arange(vocab, device=device) >= top_k, -torch.inf)
    weights = ordered.softmax(-1, dtype=torch.float64)
    before = weights.cumsum(-1) - weights
    top_p = _column([s.params.top_p for s in states], device, torch.float64)
    keep = (before < top_p) | (top_p >= 1.0)
    keep[:, 0] = True
    min_p = _column([s.params.min_p for s in states], device, torch.float64)
    keep &= weights >= min_p * weights[:, :1]
    # Back in the order of ids, so that the draw does not depend on how ties were sorted.
    weights = torch.zeros_like(weights).scatter_(1, ids, weights * keep)
    sums = weights.cumsum(-1)
    draws = _column([s.next_uniform() for s in states], device, torch.float64)
    drawn = torch.searchsorted(sums, draws * sums[:, -1:], right=True).squeeze(1)
    last = vocab - 1 - (weights.flip(-1) > 0).to(torch.uint8).argmax(-1)
    is_greedy = _column([s.params.temperature == 0.0 for s in states], device, torch.bool)
    return torch.where(is_greedy.squeeze(1), greedy, torch.minimum(drawn, last))
