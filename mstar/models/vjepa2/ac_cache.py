"""Keys and values of frames that the predictor has seen: they never change, since attention is
causal from frame to frame and positions are absolute."""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.models.vjepa2.block import attend

__all__ = ["FrameCache"]


class FrameCache:
    """Frames of some samples, in all layers.

    Args:
        kept: room for them, `[layers, 2, samples, heads, frames * tokens, head_dim]`.
        tokens: of one frame.
        context: what all samples have seen before: a cache of one sample, which is shared.
        own: frames that `kept` holds already.
    """

    def __init__(
        self, kept: Tensor, tokens: int, context: FrameCache | None = None, own: int = 0
    ) -> None:
        self.kept, self.tokens, self.context, self.own = kept, tokens, context, own

    @property
    def frames(self) -> int:
        """Frames so far, those of the context included."""
        return self.own + (0 if self.context is None else self.context.frames)

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values of the next frames, each `[samples, heads, tokens,
        head_dim]`; those of all frames so far but for the context's."""
        start = self.own * self.tokens
        end = start + k.shape[2]
        kept = self.kept[layer, :, :, :, :end]
        kept[0, :, :, start:].copy_(k)
        kept[1, :, :, start:].copy_(v)
        return kept[0], kept[1]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What queries `[samples, heads, tokens, head_dim]` see of the context and of keys and
        values `[samples, ...]` of their own.

        The context is read once, by the queries of all samples in a row. The softmax over both
        follows from those over each and the logarithms of their sums, as in FlashAttention (Dao et
        al., arXiv 2205.14135, section 3.1).
        """
        if self.context is None:
            return attend(q, k, v)
        row = q.transpose(0, 1).flatten(1, 2).unsqueeze(0)
        found, sums = _attend_and_sum(row, *self.context.kept[layer])
        found, sums = (t[0].unflatten(1, (len(q), -1)).transpose(0, 1) for t in (found, sums))
        own, own_sums = _attend_and_sum(q, k, v)
        share = torch.sigmoid(sums - own_sums).unsqueeze(-1)
        return torch.lerp(own, found, share.to(own.dtype))


def _attend_and_sum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, and float32 `[batch, heads, queries]`: the logarithms of the sums of its scores'
    exponentials."""
    if not q.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype == torch.float32:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return found[0], found[1][:, :, : q.shape[2]]  # some pad the sums
