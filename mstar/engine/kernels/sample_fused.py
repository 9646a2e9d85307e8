"""Sampling of a batch on a GPU in a few kernels, without sorting the vocabulary.

    penalties; largest logit of every block           one pass over the logits
    top-k, top-p: the last token that is kept         two passes, see `sample_cut`
    temperature, min-p, the race of what is left      one pass
    the winner of every row; its count                one program for each row

A batch of greedy rows takes the first and the last: two launches. Where nothing is cut by top-k or
top-p there are three, else seven. Nothing is read back, so all of it can be captured.

The race, its noise and the order of the tokens are those of `sample_row` (see `sample` and
`counter_noise`), in float64 as there. So the tokens are the same, but where two finish, or one is
at the border of min-p, within the rounding of exp and log, 1e-16; of the border of top-p see
`sample_cut`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mstar.engine.kernels.counter_noise import remainders
from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, triton
from mstar.engine.kernels.sample_cut import at_row, cuts_triton, extent, order

if TYPE_CHECKING:
    from mstar.engine.kernels.sample_rows import SampleRows

__all__ = ["sample_triton"]

_BLOCK = 1024


def sample_triton(
    logits: Tensor,
    rows: SampleRows,
    tables: tuple[Tensor, Tensor] | None = None,
    adjust: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """As `sample_batch`, and before it `penalise` where there are tables.

    Args:
        logits: float32 `[batch, vocab]`; overwritten where there are tables.
        tables: which tokens each sequence's prompt has, bool, and how often its output has them,
            int32 (chosen tokens are counted), both `[slots, vocab]`; None for no penalties.
        adjust: changes the logits in place between the penalties and all else.
    """
    batch, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        logits = logits.float().contiguous()
    device, blocks = logits.device, triton.cdiv(vocab, _BLOCK)
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    if not batch:
        return tokens
    extents = torch.empty(batch, 2, blocks, dtype=torch.float32, device=device)
    bests = torch.empty(batch, blocks, dtype=torch.int32, device=device)
    scores = torch.empty(batch, blocks, dtype=torch.float64, device=device)
    winners, cuts = torch.empty_like(bests), tokens
    sizes = {"PLACES": next_power_of_2(blocks), "num_warps": 4}

    def begin(*penalties: Tensor | None) -> None:
        _begin_kernel[(batch, blocks)](
            logits,
            extents,
            bests,
            *penalties,
            vocab,
            blocks,
            logits.stride(0),
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # penalties are rounded as on the CPU
        )

    if tables is not None:
        in_prompt, in_output = tables
        begin(in_prompt.view(torch.uint8), in_output, rows.slots, *rows.penalty_columns)
    if adjust is not None:
        adjust(logits)
    if tables is None or adjust is not None:
        begin(*(None,) * 6)
    temperature = None
    if not rows.are_greedy:
        temperature, top_p, min_p = rows.thresholds
        if rows.cut_by_rank:
            cuts = cuts_triton(logits, extents, (temperature, top_p, rows.top_k), _BLOCK)
        keys = rows.keys
        _race_kernel[(batch, blocks)](
            logits,
            extents,
            bests,
            cuts,
            temperature,
            min_p,
            keys,
            scores,
            winners,
            vocab,
            blocks,
            logits.stride(0),
            temperature.stride(0),
            min_p.stride(0),
            keys.stride(0),
            CUT=rows.cut_by_rank,
            BLOCK=_BLOCK,
            **sizes,
        )
    _finish_kernel[(batch,)](
        extents,
        bests,
        temperature,
        scores,
        winners,
        tokens,
        None if tables is None else tables[1],
        None if tables is None else rows.slots,
        None if tables is None else rows.counted,
        vocab,
        blocks,
        0 if temperature is None else temperature.stride(0),
        GREEDY=rows.are_greedy,
        COUNT=tables is not None,
        **sizes,
    )
    return tokens


@jit
def _begin_kernel(
    logits,  # [batch, vocab]
    extents,  # [batch, 2, blocks], out
    bests,  # [batch, blocks], out
    in_prompt,  # [slots, vocab], or None as all that follow
    in_output,  # [slots, vocab]
    slots,  # [batch]
    repetitions,  # [batch], float64 as the next two
    presences,
    frequencies,
    vocab,
    blocks,
    logits_stride,
    BLOCK: tl.constexpr,
):
    """One program: penalties of one block of one row, its largest and its least finite logit."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    id = block * BLOCK + tl.arange(0, BLOCK)
    inside = id < vocab
    place = logits + row * logits_stride + id
    value = tl.load(place, mask=inside, other=float("-inf"))
    if in_prompt is not None:
        slot = tl.load(slots + row)
        if slot > 0:
            repetition = tl.load(repetitions + row).to(tl.float32)
            presence = tl.load(presences + row).to(tl.float32)
            frequency = tl.load(frequencies + row).to(tl.float32)
            known = tl.load(in_prompt + slot * vocab + id, mask=inside, other=0) != 0
            count = tl.load(in_output + slot * vocab + id, mask=inside, other=0)
            penalised = tl.where(
                value > 0, tl.div_rn(value, tl.zeros_like(value) + repetition), value * repetition
            )
            value = tl.where(known | (count > 0), penalised, value)
            here = tl.where(count > 0, presence, 0.0)
            value = value - (here + frequency * count.to(tl.float32))
            tl.store(place, value, mask=inside)
    value = tl.where(value != value, float("inf"), value)
    top = tl.max(value, axis=0)
    low = tl.min(tl.where(value > float("-inf"), value, float("inf")), axis=0)
    tl.store(extents + row * 2 * blocks + block, top)
    tl.store(extents + (row * 2 + 1) * blocks + block, low)
    tl.store(bests + row * blocks + block, tl.min(tl.where(value == top, id, vocab), axis=0))


@jit
def _best(extents, bests, row, blocks, top, PLACES: tl.constexpr):
    """The first token of a row with its largest logit."""
    place = tl.arange(0, PLACES)
    inside = place < blocks
    tops = tl.load(extents + row * 2 * blocks + place, mask=inside, other=float("nan"))
    best = tl.load(bests + row * blocks + place, mask=inside, other=0x7FFFFFFF)
    return tl.min(tl.where(tops.to(tl.float64) == top, best, 0x7FFFFFFF), axis=0)


@jit
def _race_kernel(
    logits,  # [batch, vocab]
    extents,  # [batch, 2, blocks]
    bests,  # [batch, blocks]
    cuts,  # [batch], ignored if not CUT
    temperatures,
    min_ps,
    keys,
    scores,  # [batch, blocks], out
    winners,  # [batch, blocks], out
    vocab,
    blocks,
    logits_stride,
    temperatures_stride,
    min_ps_stride,
    keys_stride,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
):
    """One program: which token of one block of one row wins the race, and its weight / time."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = at_row(temperatures, row, temperatures_stride)
    min_p = at_row(min_ps, row, min_ps_stride)
    top, _ = extent(extents, row, blocks, PLACES)
    score = tl.full([], -1.0, tl.float64)
    winner = tl.full([], 0x7FFFFFFF, tl.int32)
    if (temperature > 0.0) & (tl.abs(top) < float("inf")):
        key = at_row(keys, row, keys_stride).to(tl.uint64, bitcast=True)
        id = block * BLOCK + tl.arange(0, BLOCK)
        inside = id < vocab
        value = tl.load(logits + row * logits_stride + id, mask=inside, other=float("-inf"))
        running = inside
        if CUT:
            running = running & (order(value, id) >= tl.load(cuts + row))
        depth = (value.to(tl.float64) - top) / temperature
        rest = remainders(key, id)
        # A time is greater than 1 - rest. So most tokens are slower than the most likely one for
        # sure, whose score is 1 / time: float32 is enough to know, and 1e-4 more than its error.
        best = _best(extents, bests, row, blocks, top, PLACES)
        lead = -1.0 / tl.log(remainders(key, best))
        bound = tl.exp(depth.to(tl.float32)) * 1.0001
        running = running & (bound >= (lead * (1.0 - rest)).to(tl.float32))
        if tl.max(running.to(tl.int32), axis=0) > 0:
            weight = tl.exp(depth)
            running = running & (weight >= min_p)
            reached = tl.where(running, weight / -tl.log(rest), -1.0)
            score = tl.max(reached, axis=0)
            winner = tl.min(tl.where(reached == score, id, 0x7FFFFFFF), axis=0)
    tl.store(scores + row * blocks + block, score)
    tl.store(winners + row * blocks + block, winner)


@jit
def _finish_kernel(
    extents,  # [batch, 2, blocks]
    bests,  # [batch, blocks]
    temperatures,
    scores,  # [batch, blocks]
    winners,  # [batch, blocks]
    tokens,  # [batch], out
    in_output,  # [slots, vocab], counted in
    slots,  # [batch]
    counted,  # [batch]
    vocab,
    blocks,
    temperatures_stride,
    GREEDY: tl.constexpr,
    COUNT: tl.constexpr,
    PLACES: tl.constexpr,
):
    """One program: the token of one row."""
    row = tl.program_id(0).to(tl.int64)
    top, _ = extent(extents, row, blocks, PLACES)
    token = _best(extents, bests, row, blocks, top, PLACES)
    if not GREEDY:  # noqa: SIM102 (this one is decided when the kernel is compiled)
        if at_row(temperatures, row, temperatures_stride) > 0.0:
            place = tl.arange(0, PLACES)
            inside = place < blocks
            score = tl.load(scores + row * blocks + place, mask=inside, other=-1.0)
            winner = tl.load(winners + row * blocks + place, mask=inside, other=0x7FFFFFFF)
            token = tl.min(tl.where(score == tl.max(score, axis=0), winner, 0x7FFFFFFF), axis=0)
    finite = tl.abs(top) < float("inf")
    tl.store(tokens + row, tl.where(finite, token, -1).to(tl.int64))
    if COUNT:
        slot = tl.load(slots + row)
        if finite & (slot > 0):
            place = in_output + slot * vocab + token
            tl.store(place, tl.load(place) + tl.load(counted + row).to(tl.int32))
