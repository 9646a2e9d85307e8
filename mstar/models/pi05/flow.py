"""The sampler: Euler's method along the flow (Lipman et al., arXiv 2210.02747), 1 to 0.

pi0's paper (arXiv 2410.24164, section IV) counts time the other way round.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Steered", "Velocity", "euler"]


class Velocity(Protocol):
    """Where noisy actions are heading."""

    def __call__(self, x: Tensor, step: int, clean: Tensor | None = None) -> Tensor:
        """Velocities like `x`, float32 `[batch, horizon, actions]`, at a step's time.

        Args:
            clean: actions whose time is 0 instead, bool `[batch or 1, horizon]`.
        """


class Steered(Protocol):
    """What bends a flow towards a chunk that is already on its way; see `rtc.py`.

    It is made of `tensors` alone, each with a first dimension of samples, or of 1 for all.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def steer(self, velocity: Velocity, steps: int) -> Velocity:
        """The velocity to follow instead."""

    def finish(self, x: Tensor) -> Tensor:
        """The actions, of what the flow ends at."""


def euler(velocity: Velocity, noise: Tensor, steps: int, steered: Steered | None = None) -> Tensor:
    """Actions float32 `[batch, horizon, actions]` of noise of that shape.

    Padding columns are part of the flow: cut them off only at its end.
    """
    if steered is not None:
        velocity = steered.steer(velocity, steps)
    x = noise
    for step in range(steps):
        x = x + (-1.0 / steps) * velocity(x, step)
    return x if steered is None else steered.finish(x)
