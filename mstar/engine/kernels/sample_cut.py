"""Where top-k and top-p cut the tokens of each row, found without sorting the vocabulary.

The order of the tokens of a row, larger logits first and of equal ones lower ids, is that of one
integer for each token, its key: what top-k and top-p keep are the tokens whose keys are at least
some cut. It is found in three passes:

- a histogram over how far below the largest logit a token is: how many tokens, and their weights;
- the tokens of those bins in which the two cuts must be (mostly one or two, with some hundred
  tokens) are listed;
- one program for each row finds the cut by bisection of the keys, counting only listed tokens.

The sums of weights are integers (the weight of the most likely token is a power of two, and all of
them fit into 62 bits), so they depend on no order and on no batch. For 157,000 tokens a weight is
rounded to 2^-44 of the largest one; so top-p keeps the tokens that `sample_row` keeps, but where
the weight up to one of them is the goal to within 2^-45 of the largest, times the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, triton

__all__ = ["at_row", "cuts_triton", "extent", "order"]

_BINS = 1024
_ROOM = 8192  # listed tokens of a row; if there are more, its cut is found among all tokens
_SPAN = 4  # blocks of a row that one program lists
_SCAN, _WAYS = 256, 16  # tokens that are compared at a time, with so many cuts


def cuts_triton(logits: Tensor, extents: Tensor, cut: tuple[Tensor, ...], block: int) -> Tensor:
    """The least key that is kept of every row, int64 `[batch]`; meaningless for greedy rows.

    Args:
        logits: float32 `[batch, vocab]`, rows contiguous.
        extents: largest and least finite logit of every block, float32 `[batch, 2, blocks]`.
        cut: temperature, top-p (float64) and top-k (int64), each `[batch, 1]`.
        block: tokens of a block.
    """
    batch, vocab = logits.shape
    blocks, device = extents.shape[2], logits.device
    bins = torch.zeros(batch, 2 * _BINS + 1, dtype=torch.int64, device=device)
    listed = torch.empty(batch, min(_ROOM, vocab), dtype=torch.int64, device=device)
    cuts = torch.empty(batch, dtype=torch.int64, device=device)
    strides = logits.stride(0), *(column.stride(0) for column in cut)
    row = (logits, extents, *cut, bins, vocab, blocks, *strides)
    sizes = {
        "BINS": _BINS,
        "PLACES": next_power_of_2(blocks),
        "UNIT": 2.0 ** (62 - vocab.bit_length()),
    }
    _fill_kernel[(batch, blocks)](*row, BLOCK=block, num_warps=4, **sizes)
    _list_kernel[(batch, triton.cdiv(blocks, _SPAN))](
        *row, listed, listed.shape[1], BLOCK=block, SPAN=_SPAN, num_warps=4, **sizes
    )
    _cut_kernel[(batch,)](
        *row, listed, listed.shape[1], cuts, BLOCK=_SCAN, WAYS=_WAYS, num_warps=8, **sizes
    )
    return cuts


@jit
def order(value, id):
    """The key, int64, of the token `id` with a finite logit or -inf: larger for those before it."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - id).to(tl.int64)


@jit
def extent(extents, row, blocks, PLACES: tl.constexpr):
    """The largest and the least finite logit of a row, float64; +inf if one is not a number."""
    place = tl.arange(0, PLACES)
    extents += row * 2 * blocks
    top = tl.max(tl.load(extents + place, mask=place < blocks, other=float("-inf")), axis=0)
    low = tl.load(extents + blocks + place, mask=place < blocks, other=float("inf"))
    return top.to(tl.float64), tl.min(low, axis=0).to(tl.float64)


@jit
def at_row(column, row, stride):
    """The entry of a row of a column `[batch, 1]`."""
    return tl.load(column + row * stride)


@jit
def _is_cut(top, temperature, top_p, top_k, vocab):
    """Whether there is anything to do: the row is drawn, and top-k or top-p leaves some out."""
    drawn = (temperature > 0.0) & (tl.abs(top) < float("inf"))
    return drawn & ((top_k < vocab) | (top_p < 1.0))


@jit
def _mass(value, top, temperature, UNIT: tl.constexpr):
    """The weights of tokens in units, int64."""
    return (tl.exp((value.to(tl.float64) - top) / temperature) * UNIT + 0.5).to(tl.int64)


@jit
def _bin(value, top, low, temperature, BINS: tl.constexpr):
    """The bin of each logit: bins are equally deep, and the last one has no bottom."""
    # Nothing below exp(-40) of the largest weight counts as a weight; no zero is divided by.
    depth = tl.maximum(tl.minimum(40.0 * temperature, top - low), 1e-40)
    below = tl.minimum(top - value.to(tl.float64), depth) * (BINS / depth)
    return tl.minimum(below, BINS - 1.0).to(tl.int32)


@jit
def _fill_kernel(
    logits,  # [batch, vocab]
    extents,  # [batch, 2, blocks]
    temperatures,
    top_ps,
    top_ks,
    bins,  # [batch, counts BINS, masses BINS, number of listed tokens]
    vocab,
    blocks,
    logits_stride,
    temperatures_stride,
    top_ps_stride,
    top_ks_stride,
    BINS: tl.constexpr,
    PLACES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the histogram of one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    temperature = at_row(temperatures, row, temperatures_stride)
    top_p, top_k = at_row(top_ps, row, top_ps_stride), at_row(top_ks, row, top_ks_stride)
    top, low = extent(extents, row, blocks, PLACES)
    if _is_cut(top, temperature, top_p, top_k, vocab):
        id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = id < vocab
        value = tl.load(logits + row * logits_stride + id, mask=inside, other=float("-inf"))
        bin = _bin(value, top, low, temperature, BINS)
        place = bins + row * (2 * BINS + 1) + bin
        if top_k < vocab:  # what is in the last bin follows from the others
            one = tl.full([BLOCK], 1, tl.int64)
            tl.atomic_add(place, one, mask=inside & (bin < BINS - 1), sem="relaxed")
        if top_p < 1.0:
            mass = _mass(value, top, temperature, UNIT)
            tl.atomic_add(place + BINS, mass, mask=inside & (mass > 0), sem="relaxed")


@jit
def _entry(values, index, SIZE: tl.constexpr):
    """An entry of a tensor; 0 for the index -1."""
    return tl.sum(tl.where(tl.arange(0, SIZE) == index, values, 0), axis=0)


@jit
def _bracket(bins, top_p, top_k, vocab, BINS: tl.constexpr):
    """The running sums of a histogram, and the bins in which the cuts of top-k and top-p must be.

    Returns:
        Counts and masses up to each bin, the bin of top-k (the last one if it keeps all), the first
        and the last one of top-p.
    """
    bin = tl.arange(0, BINS)
    counts = tl.cumsum(tl.load(bins + bin), axis=0)
    counts = tl.where(bin == BINS - 1, vocab, counts)
    masses = tl.cumsum(tl.load(bins + BINS + bin), axis=0)
    ranked = tl.where(top_k < vocab, tl.sum((counts < top_k).to(tl.int32), axis=0), BINS - 1)
    most = _entry(masses, ranked, BINS)
    least = tl.where(top_k < vocab, _entry(masses, ranked - 1, BINS), most)
    reached = masses.to(tl.float64)
    first = tl.sum((reached < _goal(top_p, least)).to(tl.int32), axis=0)
    last = tl.sum((reached < _goal(top_p, most)).to(tl.int32), axis=0)
    return counts, masses, ranked, first, tl.where(top_p < 1.0, last, -1)


@jit
def _goal(top_p, total):
    """The mass that top-p has to reach; at least the most likely token is kept."""
    return tl.maximum(top_p * total.to(tl.float64), 0.5)


@jit
def _list_kernel(
    logits,  # [batch, vocab]
    extents,  # [batch, 2, blocks]
    temperatures,
    top_ps,
    top_ks,
    bins,  # [batch, counts BINS, masses BINS, number of listed tokens]
    vocab,
    blocks,
    logits_stride,
    temperatures_stride,
    top_ps_stride,
    top_ks_stride,
    listed,  # [batch, room], out, in no order
    room,
    BINS: tl.constexpr,
    PLACES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One program: lists the keys of those tokens of SPAN blocks of a row that may be at a cut."""
    row = tl.program_id(0).to(tl.int64)
    temperature = at_row(temperatures, row, temperatures_stride)
    top_p, top_k = at_row(top_ps, row, top_ps_stride), at_row(top_ks, row, top_ks_stride)
    top, low = extent(extents, row, blocks, PLACES)
    if _is_cut(top, temperature, top_p, top_k, vocab):
        bins += row * (2 * BINS + 1)
        _, _, ranked, first, last = _bracket(bins, top_p, top_k, vocab, BINS)
        for i in range(SPAN):
            id = (tl.program_id(1) * SPAN + i) * BLOCK + tl.arange(0, BLOCK)
            inside = id < vocab
            value = tl.load(logits + row * logits_stride + id, mask=inside, other=float("-inf"))
            bin = _bin(value, top, low, temperature, BINS)
            wanted = (bin >= first) & (bin <= last) | (bin == ranked) & (top_k < vocab)
            wanted = (wanted & inside).to(tl.int32)
            count = tl.sum(wanted, axis=0)
            if count > 0:
                start = tl.atomic_add(bins + 2 * BINS, count.to(tl.int64), sem="relaxed")
                place = start + tl.cumsum(wanted, axis=0) - 1
                mask = (wanted > 0) & (place < room)
                tl.store(listed + row * room + place, order(value, id), mask=mask)


@jit
def _keys(logits, listed, crowded, start, size, BLOCK: tl.constexpr):
    """BLOCK keys of the list, or of the whole row if that is too long for one, and which exist."""
    place = start + tl.arange(0, BLOCK)
    inside = place < size
    if crowded:
        keys = order(tl.load(logits + place, mask=inside, other=float("-inf")), place)
    else:
        keys = tl.load(listed + place, mask=inside, other=0)
    return keys, inside


@jit
def _ends(logits, listed, crowded, size, least, BLOCK: tl.constexpr):
    """The least key that is at least `least`, and the greatest of all."""
    low = tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)
    high = -low
    for start in range(0, size, BLOCK):
        keys, inside = _keys(logits, listed, crowded, start, size, BLOCK)
        low = tl.where(inside & (keys >= least), tl.minimum(low, keys), low)
        high = tl.where(inside, tl.maximum(high, keys), high)
    return tl.min(low, axis=0), tl.max(high, axis=0)


@jit
def _tally(
    logits,
    listed,
    crowded,
    size,
    least,
    top,
    temperature,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many keys are at least each of `least`, and the mass of their tokens."""
    counts, masses = least * 0, least * 0
    for start in range(0, size, BLOCK):
        keys, inside = _keys(logits, listed, crowded, start, size, BLOCK)
        bits = (keys >> 32).to(tl.int32)
        value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        mass = _mass(tl.where(inside, value, float("-inf")), top, temperature, UNIT)
        chosen = (keys[:, None] >= least[None, :]) & inside[:, None]
        counts += tl.sum(chosen.to(tl.int64), axis=0)
        masses += tl.sum(tl.where(chosen, mass[:, None], 0), axis=0)
    return counts, masses


@jit
def _search(
    logits,
    listed,
    crowded,
    size,
    cut,
    beyond,
    number,
    needed,
    before,
    goal,
    top,
    temperature,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):
    """The greatest cut, up to where it makes no difference, that keeps so many tokens and so much.

    Args:
        before: the mass that is kept beside that of the counted tokens.
        cut: one that does; the number of tokens that it keeps is `number`.
        beyond: one that keeps nothing.

    Returns:
        That cut and the number of tokens.
    """
    way, fewer = tl.arange(0, WAYS), number * 0
    while (number > needed) & (number - fewer > 1):
        # Bisection, but WAYS parts at a time. What is between may not fit into an int64.
        between = beyond.to(tl.uint64, bitcast=True) - cut.to(tl.uint64, bitcast=True)
        step = ((between - 1) // WAYS + 1).to(tl.int64)
        counts, masses = _tally(
            logits, listed, crowded, size, cut + way * step, top, temperature, UNIT, BLOCK
        )
        kept = (counts >= needed) & ((before + masses).to(tl.float64) >= goal)
        chosen = tl.maximum(tl.sum(kept.to(tl.int32), axis=0) - 1, 0)
        number = _entry(counts, chosen, WAYS)
        fewer = tl.where(chosen < WAYS - 1, _entry(counts, chosen + 1, WAYS), fewer)
        beyond = tl.where(chosen < WAYS - 1, cut + (chosen + 1) * step, beyond)
        cut += chosen * step
    return cut, number


@jit
def _cut_kernel(
    logits,  # [batch, vocab]
    extents,  # [batch, 2, blocks]
    temperatures,
    top_ps,
    top_ks,
    bins,  # [batch, counts BINS, masses BINS, number of listed tokens]
    vocab,
    blocks,
    logits_stride,
    temperatures_stride,
    top_ps_stride,
    top_ks_stride,
    listed,  # [batch, room]
    room,
    cuts,  # [batch], out
    BINS: tl.constexpr,
    PLACES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):
    """One program: the cut of one row."""
    row = tl.program_id(0).to(tl.int64)
    temperature = at_row(temperatures, row, temperatures_stride)
    top_p, top_k = at_row(top_ps, row, top_ps_stride), at_row(top_ks, row, top_ks_stride)
    top, _low = extent(extents, row, blocks, PLACES)
    cut = tl.full([], -0x7FFFFFFFFFFFFFFF, tl.int64)
    if _is_cut(top, temperature, top_p, top_k, vocab):
        bins += row * (2 * BINS + 1)
        logits += row * logits_stride
        listed += row * room
        counts, masses, ranked, first, last = _bracket(bins, top_p, top_k, vocab, BINS)
        found = tl.load(bins + 2 * BINS)
        crowded = found > room
        found = tl.where(crowded, vocab, found)

        # What of the row is before the tokens counted below; nothing if these are all of them.
        by_rank = top_k < vocab
        before_rank = _entry(counts, ranked - 1, BINS)
        listed_before = found - (_entry(counts, ranked, BINS) - before_rank)
        needed = tl.where(crowded, top_k, top_k - before_rank + listed_before)
        needed = tl.where(by_rank, needed, found)
        before_first = _entry(masses, first - 1, BINS)
        before_rank_mass = _entry(masses, ranked - 1, BINS)
        listed_mass = _entry(masses, tl.minimum(last, ranked - 1), BINS) - before_first
        unlisted = tl.where(crowded, 0, before_rank_mass - listed_mass)
        before_first = tl.where(crowded, 0, before_first)

        cut, last_key = _ends(logits, listed, crowded, found, cut, BLOCK)
        beyond = last_key + 1
        cut, number = _search(
            logits,
            listed,
            crowded,
            found,
            cut,
            beyond,
            found,
            needed,
            0,
            0.0,
            top,
            temperature,
            UNIT,
            BLOCK,
            WAYS,
        )
        if top_p < 1.0:
            everywhere = tl.full([WAYS], 0, tl.int64) + cut
            _count, kept = _tally(
                logits, listed, crowded, found, everywhere, top, temperature, UNIT, BLOCK
            )
            total = unlisted + tl.max(kept, axis=0)
            total = tl.where(by_rank, total, _entry(masses, BINS - 1, BINS))
            cut, number = _search(
                logits,
                listed,
                crowded,
                found,
                cut,
                beyond,
                number,
                0,
                before_first,
                _goal(top_p, total),
                top,
                temperature,
                UNIT,
                BLOCK,
                WAYS,
            )
            # Between that and the last token that is kept there may be some that are not listed.
            cut, last_key = _ends(logits, listed, crowded, found, cut, BLOCK)
    tl.store(cuts + row, cut)
