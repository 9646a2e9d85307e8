"""The vision encoder, SigLIP on images of any size and shape, and what leads to the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.layers.linear import apply
from mstar.models.bagel.config import ViTConfig
from mstar.models.bagel.positions import Grid, grid_rows
from mstar.models.siglip import Siglip

__all__ = ["Connector", "VisionEncoder"]


class VisionEncoder(Siglip):
    """Patches -> features; `side` patches are along the sides of the table of positions."""

    def __init__(self, config: ViTConfig, side: int) -> None:
        super().__init__(config)
        self.side = side

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features `[patches, hidden]` of images.

        Args:
            patches: `[patches, patch_dim]`, those of one image after those of the other, each
                image row by row (`pixels.patchify`), -1 to 1.
            grids: patches down and across each image.

        Raises:
            ValueError: an image is larger than the table, or the grids are those of others.
        """
        lengths = [rows * columns for rows, columns in grids]
        if sum(lengths) != len(patches):
            raise ValueError(f"{len(patches)} patches, and the grids {list(grids)} of others")
        table = self.embeddings.position_embedding.weight[: self.side**2]
        places = [grid_rows(table, grid) for grid in grids]
        return self.encode(patches, places[0] if len(places) == 1 else torch.cat(places), lengths)


class Connector(nn.Module):
    """Features to inputs of the decoder: two linear layers, a GELU (in its tanh form) between."""

    def __init__(self, features: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """`[patches, features]` to `[patches, hidden]`, before the positions are added."""
        h = F.gelu(apply(self.fc1, features), approximate="tanh")
        return apply(self.fc2, h)
