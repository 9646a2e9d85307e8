"""How far what comes of actions is from what is wanted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.l1_cost import l1_cost

__all__ = ["cost"]


def cost(latents: Tensor, goal: Tensor, kind: str, eps: float | None) -> Tensor:
    """How far latents `[samples, tokens, embed_dim]` are from a goal, float32 `[samples]`.

    Args:
        kind: `"l1"`, mean absolute difference; `"l2"`, mean square; or `"cosine"`, 1 - that of all
            numbers of a sample.
        eps: of the layer norm before; None for none.
    """
    if kind == "l1":
        return l1_cost(latents, goal, eps)
    found, goal = latents.float(), goal.float()
    if eps is not None:
        found = F.layer_norm(found, found.shape[-1:], eps=eps)
    if kind == "l2":
        return (found - goal).square_().mean((1, 2))
    return 1 - torch.cosine_similarity(found.flatten(1), goal.flatten()[None])
