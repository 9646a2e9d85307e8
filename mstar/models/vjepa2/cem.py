"""The cross-entropy method over actions (V-JEPA 2, arXiv 2506.09985, section 4.2), the cost that it
lowers, and the clock that it keeps to.

Candidates are drawn around a mean; the best of them make the next mean. Only x, y, z and the
gripper are searched. A plan is a function of the noise. Nothing but the clock asks a tensor for its
value, so all of it stays on the device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.l1_cost import l1_cost

__all__ = ["SEARCHED", "Budget", "Cem", "cost"]

SEARCHED = 4  # numbers of an action: x, y, z, gripper
_MOST_GRIPPER, _LEAST_GRIPPER = 0.75, 0.25


@dataclass(frozen=True)
class Cem:
    """How to plan; the defaults are those of the published planner.

    Args:
        samples: candidates in each of the iterations, of `horizon` actions.
        topk: how many of the best make the next mean.
        maxnorm: the most that x, y and z each may change in one action, in metres.
        momentum_mean, momentum_std: how much of the last mean and deviation stays.
        momentum_mean_gripper, momentum_std_gripper: likewise, of the gripper.
        axis: index of x, y, z, gripper -> the value that it always has.
        close_gripper: the action from which on the gripper is told to close.
    """

    samples: int = 400
    horizon: int = 2
    iterations: int = 10
    topk: int = 10
    maxnorm: float = 0.05
    momentum_mean: float = 0.15
    momentum_std: float = 0.15
    momentum_mean_gripper: float = 0.15
    momentum_std_gripper: float = 0.15
    axis: Mapping[int, float] = field(default_factory=dict)
    close_gripper: int | None = None

    def start(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation before the first iteration, float32 `[horizon, 4]`."""
        mean = self._held(torch.zeros(self.horizon, SEARCHED, device=device))
        std = torch.full_like(mean, self.maxnorm)
        std[:, 3] = 1.0
        return mean, std

    def candidates(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Actions float32 `[samples, horizon, 7]` of noise `[horizon, samples, 4]`."""
        drawn = noise * std.unsqueeze(1) + mean.unsqueeze(1)
        drawn[..., :3].clamp_(-self.maxnorm, self.maxnorm)
        drawn[..., 3].clamp_(-_MOST_GRIPPER, _MOST_GRIPPER)
        actions = _actions(self._held(drawn)).transpose(0, 1)
        if self.close_gripper is not None:
            actions[:, self.close_gripper :, 6] = 1.0
        return actions

    def _held(self, searched: Tensor) -> Tensor:
        for index, value in self.axis.items():
            searched[..., index] = value
        return searched

    def places(self, count: int, first: bool) -> int:
        """How many of the best make the next mean after `count` candidates; 0 for none. In an
        iteration that was cut short, two must compete for a place: otherwise the mean would move by
        chance. In the first one few places are better than no plan."""
        if count == self.samples:
            return self.topk
        places = min(self.topk, count // 2)
        return places if places == self.topk or (first and places > 1) else 0

    def update(
        self, mean: Tensor, std: Tensor, actions: Tensor, costs: Tensor, places: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation after an iteration of actions `[samples, horizon, 7]` and their costs
        `[samples]`; `places` instead of `topk`."""
        best = actions[costs.topk(places or self.topk, largest=False).indices]
        best = best[..., [0, 1, 2, 6]]
        mean = _mixed(best.mean(0), mean, self.momentum_mean, self.momentum_mean_gripper)
        return mean, _mixed(best.std(0), std, self.momentum_std, self.momentum_std_gripper)

    def plan(self, mean: Tensor) -> Tensor:
        """Actions float32 `[horizon, 7]`; a gripper that hardly moves does not move."""
        found = _actions(mean)
        found[:, 6].masked_fill_(found[:, 6].abs() < _LEAST_GRIPPER, 0.0)
        return found


class Budget:
    """How many samples can still be scored, with as much to spare as the first batch took: for
    what a batch of few takes as well, and for handing the plan over.

    Args:
        deadline: of `time.monotonic`.
        first: samples of the first batch, from which the rest is reckoned.
    """

    def __init__(self, deadline: float, first: int) -> None:
        self.deadline, self.first = deadline, first
        self._began = 0.0
        self._each = 0.0  # seconds
        self._spare = 0.0

    def fits(self, count: int) -> int:
        """So many of `count` samples."""
        self._began = time.monotonic()
        left = self.deadline - self._began
        if not self._each:
            return min(count, self.first) if left > 0 else 0
        return max(0, min(count, int((left - self._spare) / self._each)))

    def took(self, count: int, device: torch.device) -> None:
        """So many samples were given to the device, and are waited for."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        seconds = time.monotonic() - self._began
        self._each, self._spare = seconds / count, self._spare or seconds


def cost(latents: Tensor, goal: Tensor, kind: str, eps: float | None) -> Tensor:
    """How far latents `[samples, tokens, embed_dim]` are from a goal, float32 `[samples]`.

    Args:
        kind: `"l1"`, mean absolute difference; `"l2"`, mean square; or `"cosine"`, 1 - that of all
            numbers of a sample.
        eps: of the layer norm before; None for none.
    """
    if kind == "l1":
        return l1_cost(latents, goal, eps)
    found, goal = latents.float(), goal.float()
    if eps is not None:
        found = F.layer_norm(found, found.shape[-1:], eps=eps)
    if kind == "l2":
        return (found - goal).square_().mean((1, 2))
    return 1 - torch.cosine_similarity(found.flatten(1), goal.flatten()[None])


def _mixed(new: Tensor, old: Tensor, share: float, of_gripper: float) -> Tensor:
    keep = F.pad(torch.full_like(old[:, :3], share), (0, 1), value=of_gripper)
    return (1 - keep) * new + keep * old


def _actions(searched: Tensor) -> Tensor:
    """Actions `[..., 7]` of x, y, z and gripper."""
    return torch.cat([F.pad(searched[..., :3], (0, 3)), searched[..., 3:]], -1)
