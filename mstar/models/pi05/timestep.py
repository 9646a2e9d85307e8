"""What the timestep does to the action expert: a vector c(t), and from it every norm's modulation.

    period_k = min * (max / min)^(k / (K - 1)),  e = [sin(2 pi t / period), cos(2 pi t / period)]
    c = silu(W2 silu(W1 e)),  [scale, shift, gate] = W_norm c + b_norm

(Physical Intelligence, pi0.5, arXiv 2504.16054, appendix; adaptive norms: Peebles & Xie,
arXiv 2212.09748, section 3.2.) None of it depends on the observation: for a fixed number of steps
it is a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.weights import Source
from mstar.models.pi05.config import Pi05Config

__all__ = ["FlowHeads", "flow_times"]


def flow_times(steps: int) -> list[float]:
    """The times of the steps: from 1, which is noise, towards 0, the action.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"num_steps={steps}: must be at least 1")
    return [1.0 - step / steps for step in range(steps)]


class FlowHeads(nn.Module):
    """Everything around the expert that runs in float32: time, actions in, velocities out.

    The projections that modulate the norms, one for each in the checkpoint, are one matrix.
    """

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.config = config
        width, actions = config.expert.width, config.max_action_dim
        self.action_in_proj = nn.Linear(actions, width)
        self.action_out_proj = nn.Linear(width, actions)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        self.modulation = nn.Linear(width, config.norms * 3 * width)

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint."""
        module, leaf = name.split(".")
        if module != "modulation":
            return (Source((name,)),)
        model = "paligemma_with_expert.gemma_expert.model."
        norms = [
            f"layers.{layer}.{norm}"
            for layer in range(self.config.expert.depth)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        return (Source(tuple(f"{model}{norm}.dense.{leaf}" for norm in [*norms, "norm"])),)

    def embed_time(self, times: Tensor) -> Tensor:
        """Sines and cosines float32 `[times, width]` of times float32 `[times]`."""
        config = self.config
        half = config.expert.width // 2
        exponents = torch.arange(half, dtype=torch.float64, device=times.device) / (half - 1)
        periods = config.min_period * (config.max_period / config.min_period) ** exponents
        angles = 2 * math.pi * times.double().unsqueeze(-1) / periods
        return torch.cat([angles.sin(), angles.cos()], -1).float()

    def condition(self, times: Tensor) -> Tensor:
        """c float32 `[times, width]` of times float32 `[times]`."""
        hidden = F.silu(self.time_mlp_in(self.embed_time(times)))
        return F.silu(self.time_mlp_out(hidden))

    def modulate(self, times: Tensor) -> Tensor:
        """What the expert's norms take, float32 `[times, norms, 3, width]`: 1 + scale, shift, gate.

        Args:
            times: float32 `[times]`.
        """
        width = self.config.expert.width
        found = self.modulation(self.condition(times)).view(len(times), -1, 3, width)
        found[:, :, 0] += 1
        return found

    def table(self, steps: int) -> Tensor:
        """`modulate` at the times of every step and, in the last row, at time 0, where actions
        are clean: `[steps + 1, norms, 3, width]`."""
        device = self.modulation.weight.device
        return self.modulate(torch.tensor([*flow_times(steps), 0.0], device=device))

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens `[..., width]` of noisy actions float32 `[..., actions]`."""
        return self.action_in_proj(x)

    def velocity(self, hidden: Tensor) -> Tensor:
        """Velocities float32 `[..., actions]` of normed hidden states `[..., width]`."""
        return self.action_out_proj(hidden.float())
