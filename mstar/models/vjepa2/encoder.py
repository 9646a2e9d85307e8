"""The encoder: a clip to one token for each tubelet of 2 frames x 16 x 16 pixels (as published).

Tokens are numbered by time, then row, then column. The grid is that of the pixels at hand, as in
the original code; transformers takes the one of `crop_size` for clips of every size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mstar.engine.layers.linear import linear
from mstar.engine.weights import Source
from mstar.models.vjepa2.block import Block
from mstar.models.vjepa2.config import EncoderSizes
from mstar.models.vjepa2.layout import BLOCK, sources
from mstar.models.vjepa2.rotary import grid_rotation

__all__ = ["Encoder", "gathered"]

_OUTSIDE = {
    "patch_embed.proj": "encoder.embeddings.patch_embeddings.proj",
    "norm": "encoder.layernorm",
}


class _PatchEmbed(nn.Module):
    """A convolution whose kernels do not overlap: a matrix product of flattened tubelets."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        patch, tubelet = sizes.patch_size, sizes.tubelet_size
        self.proj = nn.Conv3d(3, sizes.blocks.width, (tubelet, patch, patch))

    def forward(self, pixels: Tensor, ids: Tensor | None) -> Tensor:
        """`[batch, frames, 3, height, width]` to `[batch, tokens, width]`; one frame stands for a
        whole tubelet of such frames."""
        weight = self.proj.weight
        tubelet, patch = weight.shape[2], weight.shape[3]
        if pixels.shape[1] == 1:
            weight, tubelet = weight.sum(2, keepdim=True), 1
        elif pixels.shape[1] < tubelet:
            pixels = pixels.repeat(1, tubelet, 1, 1, 1)
        tubelets = pixels.to(weight.dtype)
        for dim, size in ((1, tubelet), (4, patch), (6, patch)):
            whole = tubelets.shape[dim] // size
            tubelets = tubelets.narrow(dim, 0, whole * size).unflatten(dim, (whole, size))
        # now: batch, times, in tubelet, channels, rows, in patch, columns, in patch
        tubelets = tubelets.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)
        if ids is not None:
            tubelets = gathered(tubelets, ids)
        return linear(tubelets, weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """Clips to tokens. Nothing here asks a tensor for its value."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.patch_embed = _PatchEmbed(sizes)
        self.blocks = nn.ModuleList(Block(sizes.blocks) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.blocks.width, sizes.blocks.eps)

    def sources(self, name: str) -> Sequence[Source]:
        return sources(name, "encoder.", _OUTSIDE, "encoder.layer", BLOCK)

    def forward(self, pixels: Tensor, ids: Tensor | None = None) -> Tensor:
        """Tokens `[batch, tokens, width]`.

        Args:
            pixels: normalised, `[batch, frames, 3, height, width]`. Frames and pixels beyond the
                last whole tubelet are left out; clips shorter than one are repeated.
            ids: only these tokens are looked at, int64 `[batch, tokens]`; as in training.
        """
        rows, columns = (side // self.sizes.patch_size for side in pixels.shape[-2:])
        x = self.patch_embed(pixels, ids)
        if ids is None:
            ids = torch.arange(x.shape[1], device=x.device)
        rotation = grid_rotation(ids, rows, columns, self.sizes.blocks.head_dim)
        for block in self.blocks:
            x = block(x, rotation)
        return self.norm(x)

    def encode_static(self, frames: Tensor) -> Tensor:
        """Tokens `[frames, rows * columns, width]` of frames `[frames, 3, height, width]`, each as
        a clip in which nothing moves."""
        return self(frames.unsqueeze(1))


def gathered(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens `[batch, chosen, width]` of `[batch, tokens, width]` by their numbers `[batch,
    chosen]`."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
