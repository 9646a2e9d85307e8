"""The experts of a mixture as two grouped matrix products: gate and up with the activation between
them, then down with the router's weights folded in. The torch reference is `experts_grouped` of
`mstar/engine/layers/moe.py`.

A program multiplies one block of items (see `expert_blocks`) by a tile of their expert's matrix,
so an expert that nobody chose is not read. With a few tokens every item is a block of its own and
nothing has to be ordered. Matrices of 8 bits are widened tile by tile, without loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, tl, triton
from mstar.engine.kernels.expert_blocks import block_count, expert_blocks_triton
from mstar.engine.kernels.scaled_product import widened
from mstar.engine.kernels.tuning import Choice, best

__all__ = ["block_rows", "grouped_experts_triton", "token_counts"]

# Tiles that are tried. Those for a few rows per expert read weights as fast as they can; those for
# many reuse them. The first fits any GPU and is what an unmeasured shape begins with.
_FEW = (
    Choice(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=2),
    Choice(BLOCK_N=32, BLOCK_K=256, num_warps=4, num_stages=2),
    Choice(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=4),
    Choice(BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=4),
)
_MANY = (
    Choice(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=2),
    Choice(BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    Choice(BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=4),
    Choice(BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=4),
)
_GATE_UP, _DOWN = "grouped_gate_up", "grouped_down"
_ALONE = 4  # up to so many tokens, two that chose the same expert are too rare to look for


def block_rows(items: int, experts: int) -> int:
    """Rows of a block: about the items of an expert, as many as matrix units take at least."""
    share = items // experts
    return 16 if share < 16 else 32 if share < 48 else 64 if share < 128 else 128


def token_counts(top_k: int, experts: int, most: int) -> list[int]:
    """Numbers of tokens up to `most` that between them need every kind of block."""
    filled = (-(-share * experts // top_k) for share in (16, 48, 128))
    return [n for n in (1, _ALONE + 1, *filled) if n <= most]


def grouped_experts_triton(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    matrix_scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """`run_experts` on a GPU; the host waits for nothing.

    Args:
        matrix_scales: of the rows of gate_up and down, float32 `[experts, rows]`, where they are
            of 8 bits.

    Sums are float32. A token's experts are added up in the order of its weights, so its result
    does not depend on how the others are routed.
    """
    (tokens, top_k), (count, hidden, inner) = experts.shape, down.shape
    if not tokens:
        return torch.zeros_like(x)
    x, experts = x.contiguous(), experts.contiguous()
    gate_up_scales, down_scales = matrix_scales
    items = tokens * top_k
    alone = tokens <= _ALONE
    size = 16 if alone else block_rows(items, count)
    if x.element_size() == 4:
        size = min(size, 32)  # products in float32 take registers, not matrix units
    if alone:
        rows = owner = experts
        blocks = items
    else:
        rows, owner = expert_blocks_triton(experts.view(-1), count, size)
        blocks = block_count(items, count, size)
    choices = _FEW if size <= 32 else _MANY
    given = {"COUNT": count, "BLOCK_M": size, "ALONE": alone}

    def gated(choice: Choice) -> Tensor:
        out = x.new_empty(items, inner)
        _gate_up_kernel[(triton.cdiv(inner, choice["BLOCK_N"]), blocks)](
            *(x, gate_up, gate_up_scales, rows, owner, out, items),
            **{"TOP_K": top_k, "K": hidden, "N": inner, **given, **choice},
        )
        return out

    def weighted(choice: Choice) -> Tensor:
        out = x.new_empty(items, hidden)
        _down_kernel[(triton.cdiv(hidden, choice["BLOCK_N"]), blocks)](
            *(active, down, down_scales, rows, owner, scales, out, items),
            **{"K": inner, "N": hidden, **given, **choice},
        )
        return out

    shape = f"{x.dtype} {count}x{inner}x{hidden} of {size}"
    if gate_up.dtype != x.dtype:
        shape += f", {gate_up.dtype}"
    active = gated(best(_GATE_UP, shape, choices, gated, x.device))
    scales = weights.float().contiguous()
    out = weighted(best(_DOWN, shape, choices, weighted, x.device))
    return out.view(tokens, top_k, hidden).sum(1)


@jit
def _items(rows, items, BLOCK_M: tl.constexpr, ALONE: tl.constexpr):
    """The items of this program's block; padding is `items`."""
    block = tl.program_id(1)
    member = tl.arange(0, BLOCK_M)
    if ALONE:
        item = tl.where(member == 0, block, items)
    else:
        item = tl.load(rows + block * BLOCK_M + member)
    return item.to(tl.int64)


@jit(varying=("items",))
def _gate_up_kernel(
    x,  # [tokens, K], contiguous, as is everything
    gate_up,  # [COUNT, 2 * N, K]
    gate_up_scales,  # [COUNT, 2 * N] float32, or None
    rows,  # see `expert_blocks`; not read where ALONE
    owner,
    out,  # [items, N]
    items,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALONE: tl.constexpr,
):
    """One program: BLOCK_N columns of gate and of up, and their product, for one block."""
    expert = tl.load(owner + tl.program_id(1)).to(tl.int64)
    if expert >= COUNT:
        return
    item = _items(rows, items, BLOCK_M, ALONE)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_item, is_column = item < items, column < N
    k = tl.arange(0, BLOCK_K)
    source = x + (item // TOP_K)[:, None] * K + k[None, :]
    matrix = gate_up + expert * (2 * N * K) + column[None, :] * K + k[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        mask = inside[:, None] & is_column[None, :]
        value = tl.load(source + start, mask=is_item[:, None] & inside[None, :], other=0.0)
        own = widened(tl.load(matrix + start, mask=mask, other=0.0), x.dtype.element_ty)
        gate = tl.dot(value, own, gate, input_precision="ieee")
        own = tl.load(matrix + N * K + start, mask=mask, other=0.0)
        own = widened(own, x.dtype.element_ty)
        up = tl.dot(value, own, up, input_precision="ieee")
    if gate_up_scales is not None:
        scale = gate_up_scales + expert * (2 * N) + column
        gate *= tl.load(scale, mask=is_column, other=0.0)[None, :]
        up *= tl.load(scale + N, mask=is_column, other=0.0)[None, :]
    dtype = out.dtype.element_ty
    gate = gate.to(dtype).to(tl.float32)  # rounded as separate operations do
    active = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    result = active * up.to(dtype).to(tl.float32)
    target = out + item[:, None] * N + column[None, :]
    tl.store(target, result.to(dtype), mask=is_item[:, None] & is_column[None, :])


@jit(varying=("items",))
def _down_kernel(
    x,  # [items, K], contiguous, as is everything
    down,  # [COUNT, N, K]
    down_scales,  # [COUNT, N] float32, or None
    rows,  # see `expert_blocks`; not read where ALONE
    owner,
    scales,  # [items] float32
    out,  # [items, N]
    items,
    K: tl.constexpr,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALONE: tl.constexpr,
):
    """One program: BLOCK_N columns of one block, times the weights of its items."""
    expert = tl.load(owner + tl.program_id(1)).to(tl.int64)
    if expert >= COUNT:
        return
    item = _items(rows, items, BLOCK_M, ALONE)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_item, is_column = item < items, column < N
    k = tl.arange(0, BLOCK_K)
    source = x + item[:, None] * K + k[None, :]
    matrix = down + expert * (N * K) + column[None, :] * K + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        value = tl.load(source + start, mask=is_item[:, None] & inside[None, :], other=0.0)
        own = tl.load(matrix + start, mask=inside[:, None] & is_column[None, :], other=0.0)
        own = widened(own, x.dtype.element_ty)
        acc = tl.dot(value, own, acc, input_precision="ieee")
    if down_scales is not None:
        own_scale = tl.load(down_scales + expert * N + column, mask=is_column, other=0.0)
        acc *= own_scale[None, :]
    scale = tl.load(scales + item, mask=is_item, other=0.0)
    target = out + item[:, None] * N + column[None, :]
    result = (acc * scale[:, None]).to(out.dtype.element_ty)
    tl.store(target, result, mask=is_item[:, None] & is_column[None, :])
