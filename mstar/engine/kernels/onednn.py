"""oneDNN's float32 matrix product on a CPU, for shapes at which torch's own product is slower."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["has_onednn", "product"]

_linear = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def has_onednn(x: Tensor) -> bool:
    """Whether `product` can take `x`."""
    return _linear is not None and x.device.type == "cpu" and x.dtype == torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: `[..., inputs]` and `[outputs, inputs]` to `[..., outputs]`."""
    return _linear(x, weight, bias, "none", [], "")
