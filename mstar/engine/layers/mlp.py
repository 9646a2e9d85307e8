"""The MLP of a transformer with a gate (Shazeer 2020, arXiv 2002.05202, equation 6)."""

from __future__ import annotations

from torch import Tensor, nn

from mstar.engine.kernels.gated import silu_mul
from mstar.engine.layers.linear import linear

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """`down(silu(gate) * up)`, gate and up as one product."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` to the same."""
        return linear(silu_mul(linear(x, self.gate_up_proj.weight)), self.down_proj.weight)
