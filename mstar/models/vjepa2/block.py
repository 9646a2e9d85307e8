"""The transformer block that all networks of V-JEPA 2 are made of: pre-norm, full attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.kernels.layer_norm import layer_norm
from mstar.engine.layers.linear import apply
from mstar.models.vjepa2.config import BlockSizes
from mstar.models.vjepa2.rotary import Rotation, rotate

__all__ = ["MLP", "Attention", "Block", "attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention `[batch, heads, tokens, head_dim]`, scores scaled by 1 / sqrt(head_dim)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Projections of one block."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=sizes.qkv_bias)
        self.proj = nn.Linear(sizes.width, sizes.width)


class MLP(nn.Module):
    """Two layers and the exact GELU between them."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.width, sizes.hidden)
        self.fc2 = nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.fc2, F.gelu(apply(self.fc1, x)))


class Block(nn.Module):
    """`x + proj(attention(norm1(x)))`, then `x + mlp(norm2(x))`."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, sizes.eps)
        self.attn = Attention(sizes)
        self.norm2 = nn.LayerNorm(sizes.width, sizes.eps)
        self.mlp = MLP(sizes)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[batch, heads, tokens, head_dim]` of tokens `[batch, tokens,
        width]`; queries and keys are turned."""
        norm = self.norm1
        qkv = apply(self.attn.qkv, layer_norm(x, norm.weight, norm.bias, norm.eps)).unflatten(
            -1, (3, self.attn.heads, -1)
        )
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = qk.unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def finish(self, x: Tensor, seen: Tensor) -> Tensor:
        """Tokens `[batch, tokens, width]` and what their queries saw, `[batch, heads, tokens,
        head_dim]`, to tokens."""
        seen = apply(self.attn.proj, seen.transpose(1, 2).flatten(2))
        norm = self.norm2
        normed, x = layer_norm(seen, norm.weight, norm.bias, norm.eps, residual=x)
        return x + self.mlp(normed)

    def forward(self, x: Tensor, rotation: Rotation | None, last: int | None = None) -> Tensor:
        """Tokens `[batch, tokens, width]` that all see each other.

        Args:
            last: only so many are wanted afterwards, those at the end.
        """
        q, k, v = self.project(x, rotation)
        if last is not None:
            q, x = q[:, :, -last:], x[:, -last:]
        return self.finish(x, attend(q, k, v))
