"""Sampling of tokens: penalties, temperature, top-k, top-p, min-p and the draw.

`sample_row` serves one row on the CPU and never sorts the whole vocabulary. `sample_batch` serves
a batch on a device: with the kernels of `sample_fused`, or without Triton with dense tensor
operations (`sample_torch`), which are also what `sample_row` is tested against.

The draw is a race: every token that is left runs for an exponential time divided by its weight,
and the first to arrive is the token. It wins with a probability proportional to its weight (this
is the Gumbel-max trick without the logarithm; Maddison, Tarlow and Minka 2014, section 2). The
times come from `counter_noise`, one for each token id. So a small change of the logits (the sums
of a matrix product depend on the shape of the batch) changes the token only where two finished
almost together, while in the usual draw, the place of one uniform number in the running sum of the
weights, it moves every border between tokens and with them many a token of a flat row.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mstar.engine.kernels.counter_noise import exponential, uniform, uniform_batch
from mstar.engine.kernels.dispatch import use_triton
from mstar.engine.kernels.sample_fused import sample_triton
from mstar.engine.kernels.sample_rows import SampleRows

if TYPE_CHECKING:
    from mstar.engine.sampling import DeviceState, HostState, SamplingParams

__all__ = [
    "bias",
    "is_biased",
    "penalise",
    "sample_batch",
    "sample_row",
    "sample_torch",
]

# Less likely than exp(-40) times the most likely token: a million of them weigh less than 1e-11.
_NEGLIGIBLE = 40.0
# Where the search for a small nucleus ends.
_FAR = 20.0
_LOWEST = float(np.finfo(np.float32).min)
_SORTABLE = 4096
_BUCKETS = 2048


def sample_row(logits: np.ndarray, state: HostState) -> int:
    """The next token of one sequence; -1 if a logit is NaN or +inf, or none is finite.

    Exact in float64, but for tokens that are less likely than exp(-40) times the most likely one:
    they are never drawn. Of equally likely tokens top-k and top-p prefer those with lower ids.

    Args:
        logits: float32 `[vocab]`; it is overwritten.
    """
    _penalise_row(logits, state)
    best = int(logits.argmax())
    top = float(logits[best])
    if not math.isfinite(top):
        return -1
    if state.params.temperature == 0.0:
        return best
    ids, weights = _survivors(logits, top, state.params)
    return _race(ids, weights, state.next_key())


def _survivors(logits: np.ndarray, top: float, params: SamplingParams) -> tuple:
    """Ids, int64 `[n]`, of the tokens that may be drawn, and their weights, float64 `[n]`.

    The weights are relative to the most likely token's. Some may be 0. Both arrays are
    scratch: they hold until the next call in this thread.
    """
    if params.top_p < 1.0 or params.top_k:
        found = _few(logits, top, params)
        if found is not None:
            return found
    likely = logits >= max(top - _NEGLIGIBLE * params.temperature, _LOWEST)
    if np.count_nonzero(likely) < len(logits) // 4:
        ids = np.flatnonzero(likely)
        values = logits[ids]
    else:
        ids, values = _scratch.every(len(logits)), logits
    if 0 < params.top_k < len(values):
        largest = _largest(values, params.top_k)
        ids, values = ids[largest], values[largest]
    weights = _scratch.floats(len(values))
    np.copyto(weights, values)
    weights -= top  # in float64
    with np.errstate(over="ignore"):
        weights /= params.temperature
    keep = None
    if params.top_p < 1.0:
        keep = _nucleus(values, weights, params.top_p)
    else:
        np.exp(weights, out=weights)
    if params.min_p > 0.0:
        heavy = weights >= params.min_p
        keep = heavy if keep is None else np.logical_and(keep, heavy, out=keep)
    if keep is not None:
        if np.count_nonzero(keep) > len(ids) // 4:
            weights *= keep  # dearer for the race, but cheaper than fresh memory
        else:
            kept = np.flatnonzero(keep)
            ids, weights = ids[kept], weights[kept]
    return ids, weights


def _few(logits: np.ndarray, top: float, params: SamplingParams) -> tuple | None:
    """The survivors where top-k or top-p leaves few: those near the top, in their order.

    Without top-k, the mass of the tokens that are far below it is not summed but bounded. None if
    it matters, or if too many are near.
    """
    top_k, temperature, top_p = params.top_k, params.temperature, params.top_p
    if top_k > _SORTABLE:
        return None
    is_near = logits >= max(top - (_NEGLIGIBLE if top_k else _FAR) * temperature, _LOWEST)
    if 0 < top_k < len(logits) and np.count_nonzero(is_near) > len(logits) // 4:
        values = logits  # to gather most of them would cost more than to look at the others
    else:
        near = is_near.nonzero()[0]
        values = logits[near]
    if 0 < top_k < len(values):
        least = np.partition(values, len(values) - top_k)[len(values) - top_k]
        kept = (values >= least).nonzero()[0]
        near, values = kept if values is logits else near[kept], values[kept]
    if len(near) > _SORTABLE:
        return None
    order = (-values).argsort(kind="stable")[: top_k or None]
    ids, weights = near[order], values[order].astype(np.float64)
    weights -= top
    with np.errstate(over="ignore"):
        weights /= temperature
    np.exp(weights, out=weights)
    count = len(ids)
    if top_p < 1.0:
        mass = weights.cumsum()
        most = mass[-1] if top_k else mass[-1] + (len(logits) - len(near)) * math.exp(-_FAR)
        before = mass - weights
        count = max(int(before.searchsorted(top_p * mass[-1])), 1)
        if top_p * most > mass[-1] or count != max(int(before.searchsorted(top_p * most)), 1):
            return None
    if params.min_p > 0.0:
        count = int(np.count_nonzero(weights[:count] >= params.min_p))
    return ids[:count], weights[:count]


def _race(ids: np.ndarray, weights: np.ndarray, key: int) -> int:
    """The id that wins with these weights: the largest weight / time."""
    times = uniform(key, ids, *_scratch.race(len(ids)))
    if len(ids) <= _SORTABLE:
        return int(ids[(weights / exponential(times)).argmax()])
    # A time is greater than the number that it is made from. So few tokens can win, and only their
    # logarithms are needed: those not slower on that number than one of them is on its time.
    bounds = np.divide(weights, times, out=weights)
    best = int(bounds.argmax())
    sure = bounds[best] * times[best] / exponential(times[best])
    near = np.flatnonzero(bounds >= sure * (1 - 1e-12))
    times = times[near]
    return int(ids[near[(bounds[near] * times / exponential(times)).argmax()]])


class _Scratch(threading.local):
    """Arrays that are used again: fresh memory of that size costs more than what is done in it."""

    def __init__(self) -> None:
        self._floats = np.empty(0, dtype=np.float64)
        self._ints = np.empty(0, dtype=np.int64)
        self._every = np.empty(0, dtype=np.int64)
        self._times = np.empty(0, dtype=np.float64)
        self._hashes = np.empty(0, dtype=np.uint64)

    def every(self, size: int) -> np.ndarray:
        """The integers below `size`; not to be written to."""
        if size > len(self._every):
            self._every = np.arange(size, dtype=np.int64)
        return self._every[:size]

    def race(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """What `uniform` needs: float64 and uint64 `[size]`, uninitialised."""
        if size > len(self._times):
            self._times = np.empty(size, dtype=np.float64)
            self._hashes = np.empty(size, dtype=np.uint64)
        return self._times[:size], self._hashes[:size]

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


def _penalise_row(logits: np.ndarray, state: HostState) -> None:
    params = state.params
    if params.repetition_penalty != 1.0:
        seen = state.seen
        values = logits[seen]
        penalty = np.float32(state.repetition)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(state.output, return_counts=True)
        logits[ids] -= np.float32(state.presence) + counts.astype(np.float32) * np.float32(
            state.frequency
        )
    if len(state.bias_ids):
        logits[state.bias_ids] += state.bias
    if len(state.stop_ids) and not state.may_stop:
        logits[state.stop_ids] = -np.inf


def penalise(logits: Tensor, in_prompt: Tensor, in_output: Tensor, rows: SampleRows) -> Tensor:
    """`logits` after repetition, presence and frequency penalties.

    Args:
        logits: float32 `[batch, vocab]`.
        in_prompt: bool `[batch, vocab]`, tokens of the prompt.
        in_output: int `[batch, vocab]`, how often a token was chosen.
    """
    repetition, presence, frequency = rows.penalties
    penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_prompt | (in_output > 0), penalised, logits)
    return logits - (presence * (in_output > 0) + frequency * in_output)


def is_biased(state: DeviceState) -> bool:
    """Whether `bias` changes the logits of this sequence now."""
    return state.bias_places is not None or (state.stop_places is not None and not state.may_stop)


def bias(logits: Tensor, states: Sequence[DeviceState]) -> Tensor:
    """`logits` `[batch, vocab]` with logit biases added, and stop tokens out while it is early."""
    for row, state in zip(logits, states, strict=True):
        if state.bias_places is not None:
            row.index_add_(0, state.bias_places, state.bias_values)
        if state.stop_places is not None and not state.may_stop:
            row.index_fill_(0, state.stop_places, -torch.inf)
    return logits


def sample_batch(logits: Tensor, rows: SampleRows) -> Tensor:
    """The next token of every row, int64 `[batch]`, from biased logits, float32 `[batch, vocab]`.

    As for `sample_row`, which takes the same steps; it does not leave out what is negligible. The
    host waits for nothing.
    """
    return (sample_triton if use_triton(logits) else sample_torch)(logits, rows)


def sample_torch(logits: Tensor, rows: SampleRows) -> Tensor:
    """`sample_batch` in plain torch."""
    top, greedy = logits.max(-1, keepdim=True)
    finite = top.isfinite()
    if rows.are_greedy:
        return torch.where(finite, greedy, -1).squeeze(1)
    temperature, top_p, min_p = rows.thresholds
    is_greedy = temperature == 0.0
    if rows.cut_by_rank:
        values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    else:
        values, ids = logits, torch.arange(rows.vocab, device=logits.device)
    weights = values.double().sub_(top).div_(temperature.masked_fill(is_greedy, 1.0)).exp_()
    if rows.cut_by_rank:
        rank = torch.arange(rows.vocab, device=logits.device)
        weights.masked_fill_(rank >= rows.top_k, 0.0)
        sums = weights.cumsum(-1)
        beyond = (sums - weights >= top_p * sums[:, -1:]).logical_and_(top_p < 1.0)
        beyond[:, 0].fill_(False)
        weights.masked_fill_(beyond, 0.0)
    weights.masked_fill_(weights < min_p, 0.0)
    place = weights.div_(exponential(uniform_batch(rows.keys, ids))).argmax(-1, keepdim=True)
    drawn = ids.gather(1, place) if rows.cut_by_rank else place
    return torch.where(finite, torch.where(is_greedy, greedy, drawn), -1).squeeze(1)
