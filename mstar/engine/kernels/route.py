"""The router of a mixture of experts: softmax, choice of the heaviest, normalisation, in one pass.

    share_e = exp(logit_e) / sum exp(logit),  weight_e = share_e / sum of the chosen shares

(Shazeer et al. 2017, section 2.1; the softmax is over all experts, as in Mixtral and Qwen3.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, use_triton

__all__ = ["route", "route_torch", "route_triton"]


def route(logits: Tensor, top_k: int, *, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """Choose experts by the router's scores `[tokens, experts]`.

    Returns:
        Weights float32 and experts int64, both `[tokens, top_k]`, the heaviest first. The weights
        are shares of the softmax over all experts; normalised, they add up to 1.
    """
    compute = route_triton if use_triton(logits) else route_torch
    return compute(logits, top_k, normalise=normalise)


def route_torch(logits: Tensor, top_k: int, *, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """`route` in plain torch."""
    logits = logits.float()
    if normalise:  # the softmax of those chosen alone
        chosen, experts = logits.topk(top_k, -1)
        return chosen.softmax(-1), experts
    weights, experts = logits.softmax(-1).topk(top_k, -1)
    return weights, experts


def route_triton(logits: Tensor, top_k: int, *, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """`route` as one Triton kernel; of equal scores the first expert is taken."""
    tokens, count = logits.shape
    logits = logits.contiguous()
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    if tokens:
        _route_kernel[(tokens,)](
            logits,
            weights,
            experts,
            COUNT=count,
            BLOCK=next_power_of_2(count),
            TOP_K=top_k,
            PLACES=next_power_of_2(top_k),
            NORMALISE=normalise,
            num_warps=1,
        )
    return weights, experts


@jit
def _route_kernel(
    logits,  # [tokens, COUNT]
    weights,  # [tokens, TOP_K]
    experts,  # [tokens, TOP_K]
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    PLACES: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """One program: one token."""
    token = tl.program_id(0).to(tl.int64)
    column, place = tl.arange(0, BLOCK), tl.arange(0, PLACES)
    inside = column < COUNT
    score = tl.load(logits + token * COUNT + column, mask=inside, other=float("-inf"))
    score = score.to(tl.float32)
    share = tl.where(inside, tl.exp(score - tl.max(score, axis=0)), -1.0)
    total = tl.sum(tl.where(inside, share, 0.0), axis=0)
    chosen = tl.zeros([PLACES], tl.int64)
    weight = tl.zeros([PLACES], tl.float32)
    for i in tl.static_range(TOP_K):
        peak = tl.max(share, axis=0)
        # Of logits that are not numbers none is the largest: any expert will do.
        first = tl.minimum(tl.min(tl.where(share == peak, column, BLOCK), axis=0), COUNT - 1)
        chosen = tl.where(place == i, first.to(tl.int64), chosen)
        weight = tl.where(place == i, peak, weight)
        share = tl.where(column == first, -1.0, share)
    if NORMALISE:
        total = tl.sum(weight, axis=0)
    tl.store(weights + token * TOP_K + place, weight / total, mask=place < TOP_K)
    tl.store(experts + token * TOP_K + place, chosen, mask=place < TOP_K)
