"""How far predicted latents are from a goal, without a normed copy of them in memory.

    cost = mean |layer_norm(predicted) - goal|

(The energy of V-JEPA 2-AC's planner, arXiv 2506.09985, section 4.2; the layer norm has neither
scale nor shift.) Computed in float32 whatever the latents are stored in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, triton, use_triton

__all__ = ["l1_cost", "l1_cost_torch", "l1_cost_triton"]

_ROWS, _TOKENS = 4, 32


def l1_cost(predicted: Tensor, goal: Tensor, eps: float | None) -> Tensor:
    """Costs float32 `[samples]`.

    Args:
        predicted: `[samples, tokens, width]`.
        goal: `[tokens, width]`.
        eps: of the layer norm; None for none.
    """
    compute = l1_cost_triton if use_triton(predicted) else l1_cost_torch
    return compute(predicted, goal, eps)


def l1_cost_torch(predicted: Tensor, goal: Tensor, eps: float | None) -> Tensor:
    """`l1_cost` in plain torch."""
    x = predicted.float()
    if eps is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=eps)
    return (x - goal.float()).abs_().mean((1, 2))


def l1_cost_triton(predicted: Tensor, goal: Tensor, eps: float | None) -> Tensor:
    """`l1_cost` as one Triton kernel: every latent is read once, and sums are written."""
    samples, tokens, width = predicted.shape
    blocks = triton.cdiv(tokens, _TOKENS)
    sums = torch.empty(samples, blocks, dtype=torch.float32, device=predicted.device)
    if samples:
        _l1_cost_kernel[(samples, blocks)](
            predicted.contiguous(),
            goal.contiguous(),
            sums,
            tokens,
            0.0 if eps is None else eps,
            NORMED=eps is not None,
            WIDTH=width,
            BLOCK=next_power_of_2(width),
            ROWS=_ROWS,
            TOKENS=_TOKENS,
            num_warps=8,
        )
    return sums.sum(1) / (tokens * width)


@jit
def _l1_cost_kernel(
    predicted,  # [samples, tokens, WIDTH], contiguous
    goal,  # [tokens, WIDTH], contiguous
    sums,  # [samples, blocks]
    tokens,
    eps,
    NORMED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: TOKENS tokens of one sample, ROWS at a time."""
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, TOKENS, ROWS):
        token = block * TOKENS + start + tl.arange(0, ROWS)[:, None]
        mask = (token < tokens) & (column < WIDTH)
        place = token * WIDTH + column
        x = tl.load(predicted + sample * tokens * WIDTH + place, mask=mask, other=0.0)
        x = x.to(tl.float32)
        if NORMED:
            centred = tl.where(mask, x - (tl.sum(x, axis=1) / WIDTH)[:, None], 0.0)
            variance = tl.sum(centred * centred, axis=1) / WIDTH
            x = centred / tl.sqrt(variance + eps)[:, None]
        far = tl.abs(x - tl.load(goal + place, mask=mask, other=0.0).to(tl.float32))
        total += tl.sum(tl.where(mask, far, 0.0), axis=1)
    tl.store(sums + sample * tl.num_programs(1) + block, tl.sum(total))
