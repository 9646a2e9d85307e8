"""The masked predictor: what the encoder would say of tokens that were not shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mstar.engine.layers.linear import apply
from mstar.engine.weights import Source
from mstar.models.vjepa2.block import Block
from mstar.models.vjepa2.config import VJEPA2Config
from mstar.models.vjepa2.layout import BLOCK, sources
from mstar.models.vjepa2.rotary import grid_rotation

__all__ = ["Predictor"]

_OUTSIDE = {
    "predictor_embed": "predictor.embeddings.predictor_embeddings",
    "predictor_norm": "predictor.layernorm",
    "predictor_proj": "predictor.proj",
}
_MASK_TOKEN = 1  # of those that were trained, for different lengths of clips


class Predictor(nn.Module):
    """Context tokens and the numbers of others to predictions of these."""

    def __init__(self, config: VJEPA2Config) -> None:
        super().__init__()
        sizes = config.predictor
        self.head_dim = sizes.head_dim
        self.predictor_embed = nn.Linear(config.hidden_size, sizes.width)
        self.mask_tokens = nn.Parameter(torch.empty(config.pred_num_mask_tokens, 1, 1, sizes.width))
        self.predictor_blocks = nn.ModuleList(
            Block(sizes) for _ in range(config.pred_num_hidden_layers)
        )
        self.predictor_norm = nn.LayerNorm(sizes.width, sizes.eps)
        self.predictor_proj = nn.Linear(sizes.width, config.hidden_size)

    def sources(self, name: str) -> Sequence[Source]:
        if name == "mask_tokens":
            each = (f"predictor.mask_tokens.{i}" for i in range(len(self.mask_tokens)))
            return Source(("predictor.embeddings.mask_tokens",)), Source(tuple(each))
        return sources(name, "predictor.", _OUTSIDE, "predictor.layer", BLOCK)

    def forward(
        self, context: Tensor, context_ids: Tensor, target_ids: Tensor, rows: int, columns: int
    ) -> Tensor:
        """Predictions `[batch, targets, hidden]`, in the order of `target_ids`.

        Tokens see each other by their positions alone, so their order does not matter and nothing
        is sorted. After the last block only targets are wanted.

        Args:
            context: of the encoder, `[batch, tokens, hidden]`.
            context_ids: their numbers, int64 `[batch, tokens]`.
            target_ids: of those to predict, int64 `[batch, targets]`.
            rows, columns: of the grid in which tokens are numbered.
        """
        mask = self.mask_tokens[_MASK_TOKEN % len(self.mask_tokens), 0]
        targets = mask.expand(*target_ids.shape, -1)
        x = torch.cat([apply(self.predictor_embed, context), targets], 1)
        ids = torch.cat([context_ids, target_ids], 1)
        rotation = grid_rotation(ids, rows, columns, self.head_dim)
        *blocks, final = self.predictor_blocks
        for block in blocks:
            x = block(x, rotation)
        x = final(x, rotation, last=target_ids.shape[1])
        return apply(self.predictor_proj, self.predictor_norm(x))
