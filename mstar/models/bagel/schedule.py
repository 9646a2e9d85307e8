"""The timesteps of the flow (Esser et al., arXiv 2403.03206, section 5.3.2), and when it is guided.

x_t = (1 - t) * data + t * noise, so t runs from 1 to 0, and one step of Euler's method is
x <- x - velocity * dt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FlowStep", "flow_steps", "timesteps"]


@dataclass(frozen=True)
class FlowStep:
    """One evaluation of the network: the timestep, how far to go, whether guidance is on."""

    t: float
    dt: float
    guided: bool


def timesteps(count: int, shift: float) -> Tensor:
    """`count` timesteps from 1 to 0, float32: s * u / (1 + (s - 1) * u) of equidistant u."""
    u = torch.linspace(1, 0, count, dtype=torch.float32, device="cpu")
    return shift * u / (1 + (shift - 1) * u)


def flow_steps(count: int, shift: float, interval: tuple[float, float]) -> list[FlowStep]:
    """The `count - 1` steps between `count` timesteps; nothing is evaluated at the last one.

    Args:
        interval: guidance is on where low < t <= high, compared in float32.
    """
    grid = timesteps(count, shift)
    low, high = torch.tensor(interval, dtype=torch.float32)
    now = grid[:-1]
    columns = now, now - grid[1:], (now > low) & (now <= high)
    return [FlowStep(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
