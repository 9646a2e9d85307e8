"""Mixture-of-experts MLP: every token goes through the `top_k` experts that a router chooses.

(Shazeer et al. 2017, section 2, with gated experts: Shazeer 2020, equation 6.)

    weights, experts = route(logits, top_k)
    y = run_experts(x, weights, experts, gate_up, down)

On a GPU `run_experts` is two grouped matrix products; `experts_loop` is what every way is compared
with.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.kernels.dispatch import use_triton
from mstar.engine.kernels.gated import silu_mul
from mstar.engine.kernels.grouped_experts import grouped_experts_triton, token_counts
from mstar.engine.kernels.route import route
from mstar.engine.layers.linear import linear
from mstar.engine.layers.mlp import GatedMLP
from mstar.engine.layers.quantized import Quantized
from mstar.engine.weights import Source

__all__ = [
    "MoE",
    "experts_grouped",
    "experts_loop",
    "route",
    "run_experts",
    "warm_experts",
]

# Elements of an expert, and products of all tokens with all experts: up to so many on a CPU, to run
# every expert costs less than a call for each one that is used.
_SMALL, _FEW = 1 << 14, 1 << 21


class MoE(nn.Module):
    """Router and experts of one layer, and the expert that all tokens share, where there is one.

    All experts' matrices are in one tensor each, so that a grouped product finds them by index.

    Args:
        hidden: width of the tokens.
        inner: width inside an expert.
        experts: how many there are.
        top_k: how many a token goes through.
        normalise: whether a token's weights are made to add up to 1.
        shared: width inside the shared expert; 0 for none.
    """

    def __init__(
        self,
        hidden: int,
        inner: int,
        experts: int,
        top_k: int,
        *,
        normalise: bool = True,
        shared: int = 0,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.normalise = normalise
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner))
        self.shared_expert = GatedMLP(hidden, shared) if shared else None
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if shared else None

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint that has every expert's matrices apart."""
        experts = range(len(self.down))
        if name == "gate_up":
            parts = ("gate_proj", "up_proj")
            return (Source(tuple(f"experts.{e}.{p}.weight" for e in experts for p in parts)),)
        if name == "down":
            return (Source(tuple(f"experts.{e}.down_proj.weight" for e in experts)),)
        if "gate_up_proj" in name:
            parts = (name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj"))
            return (Source(tuple(parts)),)
        return (Source((name,)),)

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, hidden]` to the same."""
        if x.shape[0] <= self._most_together:
            return self._together(x)
        weights, experts = route(linear(x, self.gate.weight), self.top_k, normalise=self.normalise)
        y = run_experts(x, weights, experts, self.gate_up, self.down)
        if self.shared_expert is None:
            return y
        share = linear(x, self.shared_expert_gate.weight).sigmoid()
        return torch.addcmul(y, share, self.shared_expert(x))

    @cached_property
    def _most_together(self) -> int:
        """Tokens up to which `_together` is faster; -1 for none."""
        if use_triton(self.gate.weight) or any(isinstance(m, Quantized) for m in self.modules()):
            return -1
        count, double, hidden = self.gate_up.shape
        return _FEW // (count * double * hidden) if double * hidden <= _SMALL else -1

    @cached_property
    def _together(self) -> _Together:
        return _Together(self)


class _Together:
    """All of a small layer as one MLP: a token goes through every expert, of which those that are
    not chosen count 0 times. So one whose products are infinite spoils every token."""

    def __init__(self, layer: MoE) -> None:
        experts, _, inner = layer.down.shape
        shared = layer.shared_expert
        router, downs = [layer.gate.weight], [layer.down.transpose(0, 1).flatten(1)]
        gates, ups = ([part.flatten(0, 1)] for part in layer.gate_up.chunk(2, 1))
        if shared is not None:
            gate, up = shared.gate_up_proj.weight.chunk(2)
            router.append(layer.shared_expert_gate.weight)
            gates.append(gate)
            ups.append(up)
            downs.append(shared.down_proj.weight)
        with torch.inference_mode(False), torch.no_grad():
            self.inwards = torch.cat([*router, *gates, *ups])
            self.outwards = torch.cat(downs, 1)
        width = self.outwards.shape[1]
        self.sizes = [*map(len, router), width, width]
        self.shape, self.routed = (-1, experts, inner), experts * inner
        self.top_k, self.normalise = layer.top_k, layer.normalise

    def __call__(self, x: Tensor) -> Tensor:
        scores, *share, gate, up = linear(x, self.inwards).split_with_sizes(self.sizes, -1)
        active = F.silu(gate).mul_(up)
        weights, chosen = route(scores, self.top_k, normalise=self.normalise)
        shares = weights.new_zeros(scores.shape).scatter_(1, chosen, weights)
        active[:, : self.routed].view(self.shape).mul_(shares.unsqueeze(-1))
        if share:
            active[:, self.routed :].mul_(share[0].sigmoid())
        return linear(active, self.outwards)


def run_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor | Quantized,
    down: Tensor | Quantized,
) -> Tensor:
    """The weighted sum of every token's experts.

    Args:
        x: `[tokens, hidden]`.
        weights, experts: of each token, `[tokens, top_k]`.
        gate_up: `[experts, 2 * inner, hidden]`, the gates first.
        down: `[experts, hidden, inner]`.

    Returns:
        `[tokens, hidden]`.
    """
    if isinstance(gate_up, Quantized):
        if not use_triton(x):
            return experts_grouped(x, weights, experts, gate_up, down)
        scales = gate_up.scales, down.scales
        return grouped_experts_triton(x, weights, experts, gate_up.values, down.values, scales)
    compute = grouped_experts_triton if use_triton(x) else experts_grouped
    return compute(x, weights, experts, gate_up, down)


def warm_experts(network: nn.Module, most_tokens: int) -> None:
    """Compile, and measure where it is to be done, what batches of up to so many tokens will run in
    the mixtures of a network; nothing on a CPU."""
    shapes = {(m.gate_up.shape, m.down.shape): m for m in network.modules() if isinstance(m, MoE)}
    for layer in shapes.values():
        router = layer.gate.weight
        if use_triton(router):
            for tokens in token_counts(layer.top_k, len(router), most_tokens):
                layer(router.new_zeros(tokens, router.shape[1]).normal_())


def experts_loop(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`run_experts` as it is defined: one expert after the other."""
    y = torch.zeros_like(x)
    for expert in range(len(down)):
        rows, place = (experts == expert).nonzero(as_tuple=True)
        if len(rows):
            own = linear(silu_mul(linear(x[rows], gate_up[expert])), down[expert])
            y.index_add_(0, rows, own * weights[rows, place, None].to(x.dtype))
    return y


def experts_grouped(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`run_experts` with the tokens in the order of their experts; unused experts cost nothing.

    Reads on the host how many tokens each expert has.
    """
    top_k = experts.shape[1]
    chosen, order = experts.flatten().sort()
    used, counts = chosen.unique_consecutive(return_counts=True)
    rows = x[order // top_k]
    own = torch.empty_like(rows)
    start = 0
    for expert, count in zip(used.tolist(), counts.tolist(), strict=True):
        part = slice(start, start + count)
        start += count
        own[part] = linear(silu_mul(linear(rows[part], gate_up[expert])), down[expert])
    back = torch.empty_like(own)
    back[order] = own
    return _weighted(back, weights)


def _weighted(own: Tensor, weights: Tensor) -> Tensor:
    """Sum `[tokens * top_k, hidden]` over each token's experts, in the order of their weights."""
    own = own.unflatten(0, weights.shape)
    return torch.bmm(weights.to(own.dtype).unsqueeze(1), own).squeeze(1)
