"""Keys and values of frames that the predictor has seen: they never change, since attention is
causal from frame to frame and positions are absolute."""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.models.vjepa2.config import BlockSizes

__all__ = ["FrameCache"]


class FrameCache:
    """Keys and values of `frames` frames of `samples` samples, of all layers.

    Args:
        capacity: most frames.
        tokens: of one frame.
    """

    def __init__(
        self,
        sizes: BlockSizes,
        depth: int,
        *,
        samples: int,
        capacity: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.frames = 0
        self.capacity, self.tokens = capacity, tokens
        shape = depth, 2, samples, sizes.heads, capacity * tokens, sizes.head_dim
        self._kept = torch.empty(shape, device=device, dtype=dtype)

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values of the next frames, each `[samples, heads, tokens,
        head_dim]`; those of all frames so far."""
        start = self.frames * self.tokens
        end = start + k.shape[2]
        kept = self._kept[layer, :, :, :, :end]
        kept[0, :, :, start:].copy_(k)
        kept[1, :, :, start:].copy_(v)
        return kept[0], kept[1]

    def begin_with(self, other: FrameCache) -> None:
        """Let every sample begin with the frames of the only one in `other`."""
        end = other.frames * self.tokens
        self._kept[..., :end, :].copy_(
            other._kept[..., :end, :].expand_as(self._kept[..., :end, :])
        )
        self.frames = other.frames
