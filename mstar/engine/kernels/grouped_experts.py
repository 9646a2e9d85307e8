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
_SINGLE = (  # float32 takes registers, not matrix units
    Choice(BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2),
    Choice(BLOCK_N=32, BLOCK_K=64, num_warps=4, num_stages=2),
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
    items = tokens * top_k
    alone = tokens <= _ALONE
    size = 16 if alone else block_rows(items, count)
    choices = _FEW if size <= 32 else _MANY
    if x.element_size() == 4:
        size, choices = min(size, 32), _SINGLE
    if alone:
        rows = owner = experts
        blocks = items
    else:
        rows, owner = expert_blocks_triton(experts.view(-1), count, size)
        blocks = block_count(items, count, size)
    shape = f"{x.dtype} {count}x{inner}x{hidden} of {size}"
    if gate_up.dtype != x.dtype:
        shape += f", {gate_up.dtype}"

    def product(
        name: str, x: Tensor, matrices: Tensor, width: int, scales: Tensor | None
    ) -> Tensor:
        gated = scales is None

        def run(choice: Choice) -> Tensor:
            out = x.new_empty(items, width)
            _grouped_kernel[(triton.cdiv(width, choice["BLOCK_N"]), blocks)](
                *(x, matrices, matrix_scales[not gated], rows, owner, scales, out, items),
                TOP_K=top_k if gated else 1,
                K=matrices.shape[2],
                N=width,
                COUNT=count,
                BLOCK_M=size,
                ALONE=alone,
                GATED=gated,
                **choice,
            )
            return out

        return run(best(name, shape, choices, run, x.device))

    active = product(_GATE_UP, x, gate_up, inner, None)
    out = product(_DOWN, active, down, hidden, weights.float().contiguous())
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
def _grouped_kernel(
    x,  # [items / TOP_K, K], contiguous, as is everything
    matrices,  # [COUNT, N, K]; where GATED [COUNT, 2 * N, K]
    matrix_scales,  # of their rows, float32, or None
    rows,  # see `expert_blocks`; not read where ALONE
    owner,
    scales,  # [items] float32; not read where GATED
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
    GATED: tl.constexpr,
):
    """One program: BLOCK_N columns of one block, times the weights of its items; where GATED, of
    gate and of up, and their product."""
    expert = tl.load(owner + tl.program_id(1)).to(tl.int64)
    if expert >= COUNT:
        return
    item = _items(rows, items, BLOCK_M, ALONE)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_item, is_column = item < items, column < N
    k = tl.arange(0, BLOCK_K)
    height: tl.constexpr = 2 * N if GATED else N
    source = x + (item // TOP_K)[:, None] * K + k[None, :]
    matrix = matrices + expert * (height * K) + column[None, :] * K + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        mask = inside[:, None] & is_column[None, :]
        value = tl.load(source + start, mask=is_item[:, None] & inside[None, :], other=0.0)
        own = widened(tl.load(matrix + start, mask=mask, other=0.0), x.dtype.element_ty)
        total = tl.dot(value, own, total, input_precision="ieee")
        if GATED:
            own = tl.load(matrix + N * K + start, mask=mask, other=0.0)
            own = widened(own, x.dtype.element_ty)
            up = tl.dot(value, own, up, input_precision="ieee")
    if matrix_scales is not None:
        scale = matrix_scales + expert * height + column
        total *= tl.load(scale, mask=is_column, other=0.0)[None, :]
        if GATED:
            up *= tl.load(scale + N, mask=is_column, other=0.0)[None, :]
    dtype = out.dtype.element_ty
    if GATED:
        gate = total.to(dtype).to(tl.float32)  # rounded as separate operations do
        active = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        result = active * up.to(dtype).to(tl.float32)
    else:
        result = total * tl.load(scales + item, mask=is_item, other=0.0)[:, None]
    target = out + item[:, None] * N + column[None, :]
    tl.store(target, result.to(dtype), mask=is_item[:, None] & is_column[None, :])
