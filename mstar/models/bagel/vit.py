"""The vision encoder: SigLIP on images of any size and shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mstar.models.bagel.config import ViTConfig
from mstar.models.bagel.positions import Grid, grid_rows
from mstar.models.siglip import Siglip

__all__ = ["VisionEncoder"]


class VisionEncoder(Siglip):
    """Patches -> features.

    Args:
        side: patches along the sides of the table of positions.
    """

    def __init__(self, config: ViTConfig, side: int) -> None:
        super().__init__(config)
        self.side = side

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Encode images.

        Args:
            patches: `[patches, patch_dim]`, those of one image after those of the other, each
                image row by row (`pixels.patchify`), -1 to 1.
            grids: patches down and across each image.

        Returns:
            Features `[patches, hidden]`.

        Raises:
            ValueError: an image is larger than the table of positions, or the grids are not those
                of the patches.
        """
        lengths = [rows * columns for rows, columns in grids]
        if sum(lengths) != len(patches):
            raise ValueError(f"{len(patches)} patches, and the grids {list(grids)} of others")
        table = self.embeddings.position_embedding.weight[: self.side**2]
        places = [grid_rows(table, grid) for grid in grids]
        return self.encode(patches, places[0] if len(places) == 1 else torch.cat(places), lengths)
