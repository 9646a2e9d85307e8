"""x @ weight.T + bias, by whichever library is fastest for it.

On a CPU in float32, oneDNN's inner product is 2 to 3 times as fast as the BLAS that torch ships
with once the weight is large (measured on an AMD EPYC: 5632 x 1024, 1 row 0.43 against 0.98 ms,
8 rows 0.67 against 1.60 ms); small ones are not worth its overhead of 10 us a call.

On a GPU, a few rows go through a kernel of ours where that was measured to be faster. A `Quantized`
weight has products of its own.

The last bits of a row may depend on how many rows there are: no library here promises otherwise.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.kernels.matvec import MOST_ROWS, matvec_choice, matvec_triton
from mstar.engine.kernels.onednn import has_onednn, product
from mstar.engine.layers.quantized import Quantized, quantized_linear

__all__ = ["apply", "linear"]

_LARGE = 1 << 17


def linear(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None) -> Tensor:
    """`[..., inputs]` and `[outputs, inputs]` to `[..., outputs]`."""
    if isinstance(weight, Quantized):
        return quantized_linear(x, weight, bias)
    if weight.numel() >= _LARGE and has_onednn(x):
        return product(x, weight, bias)
    if x.is_cuda and x.numel() <= MOST_ROWS * weight.shape[1]:
        choice = matvec_choice(x, weight)
        if choice is not None:
            return matvec_triton(x, weight, bias, choice)
    return F.linear(x, weight, bias)


def apply(layer: nn.Linear, x: Tensor) -> Tensor:
    """`linear` with the weight and bias of a layer."""
    return linear(x, layer.weight, layer.bias)
