"""What pi0.5 sees with: SigLIP on images of one size, and the projection to the prefix's width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from mstar.engine.weights import Source
from mstar.models.pi05.sizes import VisionSizes
from mstar.models.siglip import Siglip

__all__ = ["VisionTower"]

_PATCHES = "embeddings.patch_embedding.weight"


class VisionTower(Siglip):
    """Images -> features."""

    config: VisionSizes

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint; it embeds patches by a convolution."""
        found = super().sources(name)
        if name != _PATCHES:
            return found
        return [replace(s, combine=lambda kernels: kernels[0].flatten(1)) for s in found]

    def forward(self, images: Tensor) -> Tensor:
        """Features `[images, patches, hidden]` of images `[images, 3, height, width]`, -1 to 1."""
        size, count = self.config.patch_size, len(images)
        x = images.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # c, rows, a, columns, b
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
        each = self.config.positions
        places = self.embeddings.position_embedding.weight.repeat(count, 1)
        return self.encode(patches, places, [each] * count).view(count, each, -1)
