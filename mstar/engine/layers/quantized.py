"""Weights of 8 bits: `values * scales`, with one scale for every row, which is an output channel.

Symmetric, to the nearest (Jacob et al. 2018, arXiv 1712.05877, section 2; e4m3: Micikevicius et al.
2022, arXiv 2209.05433). Two kinds:

- `"int8"` rounds weights only.
- `"fp8"` also rounds what they are multiplied with, each token by itself, so that matrix units for
  fp8 can do it. Experts of a mixture are multiplied with their tokens as they are.

No scale depends on what else is in a batch: a token gets what it gets alone, up to the last bits of
sums, of which rounding to e4m3 can make more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mstar.engine.kernels.dispatch import use_triton
from mstar.engine.kernels.quantize_rows import FP8, quantize_rows, quantize_rows_torch
from mstar.engine.kernels.scaled_product import WARM_ROWS, scaled_product
from mstar.errors import InvalidRequest

__all__ = [
    "Quantization",
    "Quantized",
    "check_quantization",
    "quantized_linear",
    "warm_quantized",
]

_KINDS = {"int8": torch.int8, "fp8": FP8}
_STRIP = 1 << 20  # elements that are rounded at a time


@dataclass(frozen=True)
class Quantization:
    """What is to be done to the weights of a network as they are loaded.

    Args:
        kind: `"int8"` or `"fp8"`.
        layers: a regular expression that is found in the names of the matrices that are quantised.
    """

    kind: str
    layers: str

    def takes(self, names: list[str], tensor: Tensor) -> bool:
        """Whether a parameter is to be quantised; one that is tied, if all its names say so."""
        is_matrix = tensor.ndim >= 2 and tensor.is_floating_point()
        return is_matrix and all(re.search(self.layers, name) for name in names)


class Quantized(nn.Module):
    """A weight that takes a parameter's place in its module.

    Args:
        values: int8 or e4m3, `[..., outputs, inputs]`, contiguous.
        scales: float32 `[..., outputs]`.
        rounds_inputs: whether what it is multiplied with is rounded to e4m3, too.
    """

    def __init__(self, values: Tensor, scales: Tensor, rounds_inputs: bool = False) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.rounds_inputs = rounds_inputs

    @classmethod
    def empty(cls, shape: torch.Size, kind: str, device: torch.device | str) -> Quantized:
        """Room for a weight."""
        values = torch.empty(shape, dtype=_KINDS[kind], device=device)
        scales = torch.empty(shape[:-1], dtype=torch.float32, device=device)
        return cls(values, scales, kind == "fp8" and len(shape) == 2)

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.values.shape

    def __getitem__(self, expert: int) -> Quantized:
        """The matrix of one expert."""
        return Quantized(self.values[expert], self.scales[expert])

    def fill(self, row: int, piece: Tensor) -> None:
        """Round `piece`, `[..., inputs]`, to the rows from `row` on, on the weight's device."""
        values, scales = self.values.flatten(0, -2), self.scales.flatten()
        piece = piece.reshape(-1, values.shape[1])
        for part in piece.split(max(1, _STRIP // values.shape[1])):
            rows = slice(row, row + len(part))
            rounded = quantize_rows_torch(part.to(values.device), values.dtype)
            values[rows], scales[rows] = rounded
            row += len(part)


def quantized_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """`[..., inputs]` and `[outputs, inputs]` to `[..., outputs]`."""
    rows, row_scales = x.reshape(-1, x.shape[-1]), None
    if weight.rounds_inputs:
        rows, row_scales = quantize_rows(rows)
    y = scaled_product(rows, weight.values, weight.scales, bias, row_scales, x.dtype)
    return y.view(*x.shape[:-1], y.shape[1])


def warm_quantized(networks: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Compile, and measure where it is to be done, what products of any number of tokens will run
    in the networks; nothing on a CPU. Experts are warmed with their mixture."""
    layers = [x for net in networks for x in net.modules() if isinstance(x, Quantized)]
    matrices = {(x.shape, x.rounds_inputs): x for x in layers if len(x.shape) == 2}
    for matrix in matrices.values():
        if use_triton(matrix.values):
            for rows in WARM_ROWS:
                x = matrix.scales.new_zeros(rows, matrix.shape[1], dtype=dtype)
                quantized_linear(x, matrix)


def check_quantization(kind: str, device: torch.device) -> None:
    """Whether there is such a kind, and the device can do it.

    Raises:
        InvalidRequest: it is not so.
    """
    if not isinstance(kind, str) or kind not in _KINDS:
        allowed = " or ".join(map(repr, _KINDS))
        raise InvalidRequest("quantization", kind, f"must be {allowed}, or None for none")
    if kind == "fp8" and device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < (8, 9):
            having = "{}.{}".format(*found)
            allowed = f"needs a GPU of compute capability 8.9, this one has {having}; int8 does not"
            raise InvalidRequest("quantization", kind, allowed)
