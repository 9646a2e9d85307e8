"""Tokens in the order of their experts, in blocks that belong to one expert each: the rows that a
grouped matrix product works on, laid out on the device with no host in between.

An item is one token's visit to one expert, `token * top_k + place`. Every expert's items are padded
to whole blocks (the aligned layout of Gale et al. 2022, MegaBlocks, section 5.1); how many blocks
there can be follows from shapes alone, so that a captured graph serves every routing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl

__all__ = ["block_count", "expert_blocks_torch", "expert_blocks_triton"]

_CHUNK = 1024


def block_count(items: int, experts: int, size: int) -> int:
    """The most blocks of `size` rows that so many items of so many experts can need."""
    return min(items, items // size + min(items, experts))


def expert_blocks_torch(experts: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows of blocks and the blocks' experts, both int32.

    Args:
        experts: of each item, int64 `[items]`, from 0 to `count` - 1.
        count: how many experts there are.
        size: rows of a block.

    Returns:
        Items `[blocks * size]`, in their order within an expert; padding is `items`. And the
        expert of every block, `[blocks]`; `count` for blocks that are not needed.
    """
    items = len(experts)
    blocks = block_count(items, count, size)
    counts = (experts.unsqueeze(0) == torch.arange(count, device=experts.device)[:, None]).sum(1)
    needed = (counts + size - 1) // size
    ends = needed.cumsum(0)
    chosen, order = experts.sort(stable=True)
    rank = torch.arange(items, device=experts.device) - (counts.cumsum(0) - counts)[chosen]
    rows = experts.new_full((blocks * size,), items, dtype=torch.int32)
    rows[(ends - needed)[chosen] * size + rank] = order.int()
    owner = torch.searchsorted(ends, torch.arange(blocks, device=experts.device), right=True)
    return rows, owner.int()


def expert_blocks_triton(experts: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """`expert_blocks_torch` as one Triton kernel; rows of blocks that are not needed are left as
    they are."""
    items = len(experts)
    blocks = block_count(items, count, size)
    rows = torch.empty(blocks * size, dtype=torch.int32, device=experts.device)
    owner = torch.empty(blocks, dtype=torch.int32, device=experts.device)
    if items:
        _expert_blocks_kernel[(count + 1,)](
            experts,
            rows,
            owner,
            items,
            blocks,
            COUNT=count,
            SIZE=size,
            BINS=next_power_of_2(count + 1),
            CHUNK=_CHUNK,
            num_warps=4,
        )
    return rows, owner


@jit(varying=("items", "blocks"))
def _expert_blocks_kernel(
    experts,  # [items] int64
    rows,  # [blocks * SIZE]
    owner,  # [blocks]
    items,
    blocks,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one expert, or (the last one) the blocks that nobody needs."""
    own = tl.program_id(0)
    place = tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, items, CHUNK):
        inside = start + place < items
        expert = tl.load(experts + start + place, mask=inside, other=COUNT).to(tl.int32)
        counts += tl.histogram(expert, BINS)
    needed = tl.where(bins < COUNT, (counts + SIZE - 1) // SIZE, 0)
    first = tl.sum(tl.where(bins < own, needed, 0), axis=0)
    wanted = tl.sum(tl.where(bins == own, needed, 0), axis=0)
    last = tl.where(own == COUNT, blocks, first + wanted)
    for block in range(first, last):
        tl.store(owner + block, own)
    if wanted > 0:
        row = rows + first * SIZE
        taken = 0
        for start in range(0, items, CHUNK):
            inside = start + place < items
            expert = tl.load(experts + start + place, mask=inside, other=COUNT).to(tl.int32)
            is_own = (expert == own).to(tl.int32)
            rank = taken + tl.cumsum(is_own, axis=0) - 1
            tl.store(row + rank, start + place, mask=is_own != 0)
            taken += tl.sum(is_own, axis=0)
        for start in range(taken, wanted * SIZE, CHUNK):
            spare = start + place
            tl.store(row + spare, tl.zeros([CHUNK], tl.int32) + items, mask=spare < wanted * SIZE)
