"""Pre-norm layers whose residual additions are done by the norm that follows."""

from __future__ import annotations

from torch import Tensor, nn

from mstar.engine.kernels.layer_norm import layer_norm

__all__ = ["normed"]


def normed(norm: nn.LayerNorm, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of a residual stream with what is still to be added to it, and the stream.

    Args:
        added: like `x`; None where nothing is.
    """
    if added is None:
        return layer_norm(x, norm.weight, norm.bias, norm.eps), x
    return layer_norm(x, norm.weight, norm.bias, norm.eps, added)
