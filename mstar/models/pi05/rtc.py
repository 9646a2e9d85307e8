"""Real-time chunking: a new chunk that goes on where the last one is when it arrives.

Black, Galliker & Levine, "Real-time execution of action chunking flow policies"
(arXiv 2506.07339) for the guided mode; "Training-time action conditioning for efficient real-time
chunking" (arXiv 2512.05964) for the trained one. Chunks are in the model's normalised space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.models.parameters import demand
from mstar.models.pi05.flow import Velocity
from mstar.models.pi05.timestep import flow_times

__all__ = ["Guided", "HardPrefix", "guidance_gains", "guided", "padded", "trained"]

_FALLS: dict[str, Callable[[float], float]] = {
    "LINEAR": lambda left: left,
    "EXP": lambda left: left * math.expm1(left) / math.expm1(1),
    "ONES": lambda left: 1.0,
    "ZEROS": lambda left: 0.0,
}


@dataclass(frozen=True)
class Guided:
    """Pulls the flow towards an earlier chunk, the first actions more than later ones.

    The paper's correction goes through the Jacobian of the predicted actions; lerobot, and so this,
    takes the identity for it: no backward pass.

    Args:
        previous: float32 `[batch or 1, horizon, actions]`.
        weights: float32 `[batch or 1, horizon]`; all zero for no guidance at all.
        gains: of each step, float32 `[batch or 1, steps]`.
    """

    previous: Tensor
    weights: Tensor
    gains: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Steered`."""
        return self.previous, self.weights, self.gains

    def steer(self, velocity: Velocity, steps: int) -> Velocity:
        """See `Steered.steer`."""
        times, weights = flow_times(steps), self.weights.unsqueeze(-1)
        if self.gains.shape[1] != steps:
            raise ValueError(f"gains of {self.gains.shape[1]} steps, for {steps}")

        def steered(x: Tensor, step: int, clean: Tensor | None = None) -> Tensor:
            v = velocity(x, step)
            error = (self.previous - (x - times[step] * v)) * weights
            return v - self.gains[:, step, None, None] * error

        return steered

    def finish(self, x: Tensor) -> Tensor:
        """See `Steered.finish`."""
        return x


@dataclass(frozen=True)
class HardPrefix:
    """Keeps the first actions of a chunk as they are, for policies that were trained for it.

    Args:
        previous: float32 `[batch or 1, horizon, actions]`.
        clean: which actions are kept, bool `[batch or 1, horizon]`; none for plain sampling.
    """

    previous: Tensor
    clean: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Steered`."""
        return self.previous, self.clean

    def steer(self, velocity: Velocity, steps: int) -> Velocity:
        """See `Steered.steer`."""
        return lambda x, step, clean=None: velocity(self.finish(x), step, self.clean)

    def finish(self, x: Tensor) -> Tensor:
        """See `Steered.finish`."""
        return torch.where(self.clean.unsqueeze(-1), self.previous, x)


def guided(
    previous: Tensor,
    *,
    delay: int,
    horizon: int,
    actions: int,
    steps: int,
    schedule: str = "LINEAR",
    execution_horizon: int = 10,
    max_weight: float = 10.0,
) -> Guided:
    """Guidance by what is left of the last chunk.

    Args:
        previous: float32 `[left, dims]` or `[batch, left, dims]`.
        delay: control steps until the new chunk arrives.
        horizon, actions: shape of a chunk, with its padding columns.
        steps: of the flow.
        schedule: how weights fall off between the delay and the execution horizon; of
            `config.SCHEDULES`.
        execution_horizon: actions that are guided.
        max_weight: largest gain.

    Raises:
        InvalidRequest: the chunk or a number does not fit.
    """
    whole = padded(previous, horizon, actions)
    weights = prefix_weights(horizon, delay, min(execution_horizon, previous.shape[-2]), schedule)
    gains = guidance_gains(steps, max_weight)
    device = whole.device
    weights, gains = (torch.tensor([each], device=device) for each in (weights, gains))
    return Guided(whole, weights, gains)


def trained(
    previous: Tensor, *, delay: int, max_delay: int, horizon: int, actions: int
) -> HardPrefix:
    """The beginning of a chunk that follows from the last one.

    Args:
        previous: float32 `[left, dims]` or `[batch, left, dims]`.
        delay: how many of its rows are kept.
        max_delay: the longest that the policy was trained with.
        horizon, actions: shape of a chunk, with its padding columns.

    Raises:
        InvalidRequest: the policy was not trained for it, or the chunk is too short.
    """
    trained = 0 <= delay <= max_delay
    demand(trained, "inference_delay", delay, f"the policy was trained for 0 to {max_delay}")
    demand(delay < horizon, "inference_delay", delay, f"must be below the horizon of {horizon}")
    rows, field = previous.shape[-2], "prev_chunk_left_over"
    demand(rows >= delay, field, f"{rows} rows", f"needs {delay}, the delay")
    finite = bool(previous[..., :delay, :].isfinite().all())
    demand(finite, field, "given", "must be finite")
    clean = torch.arange(horizon, device=previous.device) < delay
    return HardPrefix(padded(previous, horizon, actions), clean.unsqueeze(0))


def prefix_weights(horizon: int, delay: int, end: int, schedule: str = "LINEAR") -> list[float]:
    """How much each action of a chunk is held to the last one (equation 5).

    Args:
        delay: actions that will have been executed: weight 1.
        end: actions from here on are free.
    """
    demand(schedule in _FALLS, "schedule", schedule, f"must be one of {', '.join(_FALLS)}")
    fall = _FALLS[schedule]
    start = max(0, min(delay, end))
    between = [fall(1 - (index + 1) / (end - start + 1)) for index in range(end - start)]
    return ([1.0] * start + between + [0.0] * horizon)[:horizon]


def guidance_gains(steps: int, max_weight: float = 10.0) -> list[float]:
    """min(max_weight, (1 - tau) / tau / r^2) of every step, r^2 = (1 - tau)^2 / (tau^2 +
    (1 - tau)^2), with tau = 1 - t (equations 2 and 4)."""

    def gain(t: float) -> float:
        tau = 1 - t
        return math.inf if tau == 0 else (t / tau) * (t**2 + tau**2) / t**2

    return [min(max_weight, gain(t)) for t in flow_times(steps)]


def padded(chunk: Tensor, horizon: int, actions: int) -> Tensor:
    """A chunk float32 `[batch or 1, horizon, actions]`, zeros behind what is given.

    Raises:
        InvalidRequest: it is larger than that.
    """
    rows = chunk if chunk.ndim == 3 else chunk.unsqueeze(0)
    fits = rows.ndim == 3 and rows.shape[1] <= horizon and rows.shape[2] <= actions
    demand(fits, "prev_chunk_left_over", list(chunk.shape), f"at most [{horizon}, {actions}]")
    out = rows.new_zeros(len(rows), horizon, actions, dtype=torch.float32)
    out[:, : rows.shape[1], : rows.shape[2]] = rows
    return out
