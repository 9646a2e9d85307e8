"""Robot units to the model's space and back, by the statistics of the training data.

lerobot and openpi differ in what keeps a range of zero from being divided by; openpi computes in
float64. Nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mstar.errors import WeightsError

__all__ = ["Normalizer", "relative_mask"]

_ENDS = {"QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"), "MIN_MAX": ("min", "max")}
_EPS = 1e-6  # of openpi


@dataclass(frozen=True)
class Normalizer:
    """One feature's.

    Args:
        feature: its name, for messages.
        mode: IDENTITY, MEAN_STD, MIN_MAX, QUANTILES or QUANTILE10.
        statistics: name -> values `[dims]`; without them, values pass as they are.
        openpi: whether openpi's arithmetic is meant, and not lerobot's.
        eps: of lerobot.

    Raises:
        WeightsError: statistics lack what the mode needs.
    """

    feature: str
    mode: str
    statistics: Mapping[str, np.ndarray] | None = None
    openpi: bool = False
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.statistics is None or self.mode == "IDENTITY":
            return
        lacking = [name for name in self._names if name not in self.statistics]
        if lacking:
            raise WeightsError(
                f"the statistics of {self.feature} lack {', '.join(lacking)}, which {self.mode} "
                f"needs; they have {', '.join(sorted(self.statistics)) or 'nothing'}"
            )
        kind = np.float64 if self.openpi else np.float32
        ends = [np.asarray(self.statistics[name], kind).reshape(-1) for name in self._names]
        if len(ends[0]) != len(ends[1]) or not all(np.isfinite(end).all() for end in ends):
            raise WeightsError(
                f"the statistics of {self.feature} must be finite, and as many of each"
            )
        one, other = ends
        if self.mode != "MEAN_STD":
            other = other - one
            if not self.openpi:
                other = np.where(other == 0, kind(self.eps), other)
        object.__setattr__(self, "_ends", (one, other + kind(_EPS) if self.openpi else other))

    @property
    def _names(self) -> tuple[str, str]:
        return ("mean", "std") if self.mode == "MEAN_STD" else _ENDS[self.mode]

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return hasattr(self, "_ends")

    @property
    def known(self) -> bool:
        """Whether what comes back is in robot units: not so where statistics are missing."""
        return self.active or self.mode == "IDENTITY"

    def __str__(self) -> str:
        return self.mode if self.known else f"{self.mode}, of which there are none"

    @property
    def dims(self) -> int | None:
        """How many dimensions there are statistics for."""
        return len(self._ends[0]) if self.active else None

    def forward(self, x: np.ndarray) -> np.ndarray:
        """`[..., dims]` in robot units to the model's space."""
        if not self.active:
            return x
        one, extent = (end[: x.shape[-1]] for end in self._ends)
        if self.mode == "MEAN_STD":
            return (x - one) / (extent if self.openpi else extent + x.dtype.type(self.eps))
        return 2 * (x - one) / extent - 1

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """`[..., dims]` in the model's space to robot units; further dimensions pass."""
        if not self.active:
            return y
        return self._restored(y, *self._ends, np.concatenate)

    def inverse_on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """`inverse` for tensors on a device: the same bits."""
        if not self.active:
            return lambda y: y
        one, extent = (torch.from_numpy(end).to(device) for end in self._ends)
        return lambda y: self._restored(y, one, extent, torch.cat)

    def _restored(self, y: Any, one: Any, extent: Any, concatenate: Callable[..., Any]) -> Any:
        rest = y[..., len(one) :]
        y = y[..., : len(one)]
        x = y * extent + one if self.mode == "MEAN_STD" else (y + 1) * extent / 2 + one
        return concatenate([x, rest], -1) if rest.shape[-1] else x


def relative_mask(
    dims: int, exclude: tuple[str, ...] = (), names: tuple[str, ...] | None = None
) -> np.ndarray:
    """Which actions are relative to the state, bool `[dims]`: all but those with excluded names."""
    if names is None:
        return np.ones(dims, bool)
    found = [not any(part.lower() in name.lower() for part in exclude) for name in names]
    return np.array([*found, *[True] * dims][:dims], bool)
