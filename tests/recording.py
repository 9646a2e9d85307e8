"""Stands for CUDA graphs where there is no GPU."""

from __future__ import annotations

__all__ = ["replays"]


def replays(step):
    """A `record` that runs the step again for each replay, into the same outputs."""
    outputs = step()

    def replay():
        for target, value in zip(outputs, step(), strict=True):
            target.copy_(value)

    return replay, outputs
