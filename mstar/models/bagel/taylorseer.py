"""TaylorSeer (Liu et al., arXiv 2503.06923): most steps of a flow guess what the network would say.

The output of the decoder's last layer changes smoothly from step to step. Where the network runs,
finite differences estimate its derivatives; in between, a Taylor series stands in for all layers.

    h = seer.observe(run(...)) if seer.is_due else seer.predict()
"""

from __future__ import annotations

from math import factorial

from torch import Tensor

__all__ = ["TaylorSeer"]

_INTERVAL = 3  # the network runs in every third step
_WARMUP = 5  # and in the first five
_ORDER = 6


class TaylorSeer:
    """The steps of one branch of one request: at each, call either `observe` or `predict`."""

    def __init__(self) -> None:
        self._step = 0
        self._guessed = 0  # steps since the network ran
        self._seen = [0, 0]  # the two latest steps at which it ran
        self._factors: list[Tensor] = []  # derivatives at the latest one, the value first

    @property
    def is_due(self) -> bool:
        """Whether the network has to run in this step."""
        return self._step < _WARMUP or self._guessed == _INTERVAL - 1

    def observe(self, output: Tensor) -> Tensor:
        """Take what the last layer put out, of any shape; returns it."""
        before, now = self._seen[1], self._step
        factors = [output]
        if now >= _WARMUP - 1:
            for old in self._factors[:_ORDER]:
                factors.append((factors[-1] - old) / (now - before))
        self._factors = factors
        self._seen = [before, now]
        self._step, self._guessed = now + 1, 0
        return output

    def predict(self) -> Tensor:
        """What the last layer would put out."""
        away = self._step - self._seen[1]
        self._step += 1
        self._guessed += 1
        total = self._factors[0]
        for order, factor in enumerate(self._factors[1:], start=1):
            total = total + factor * (away**order / factorial(order))
        return total
