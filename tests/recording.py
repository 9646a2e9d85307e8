"""Stands for CUDA graphs where there is no GPU."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Strict", "replays", "strict_replays"]


class Strict(TorchDispatchMode):
    """Refuses what a CUDA graph could not hold: values read by the host, constants brought from it,
    shapes that follow from values, dice."""

    REFUSED = "item", "_local_scalar", "lift_fresh", "equal", "nonzero", "masked_select", "unique"
    DICE = "rand", "normal", "uniform", "bernoulli", "multinomial"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith((*self.REFUSED, *self.DICE)):
            raise AssertionError(f"{name} cannot be captured")
        return func(*args, **(kwargs or {}))


def replays(step):
    """A `record` that runs the step again for each replay, into the same outputs."""
    outputs = step()

    def replay():
        for target, value in zip(outputs, step(), strict=True):
            target.copy_(value)

    return replay, outputs


def strict_replays(step):
    """`replays`, if the step can be captured once it has run, as `record` has it."""
    step()
    with Strict():
        return replays(step)
