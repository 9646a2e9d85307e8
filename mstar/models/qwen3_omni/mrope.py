"""Rotary positions with three axes: time, height, width (Qwen2-VL, arXiv 2409.12191, section 2.1).

The frequencies of a head are dealt out to the axes in turn (Qwen3-VL, arXiv 2511.21631, section 2),
so that each of them gets fast and slow ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mstar.engine.layers.rotary import inverse_frequencies

__all__ = ["MRotary"]


class MRotary:
    """Angles of one network's rotary embedding.

    Args:
        head_dim: size of a head.
        theta: base of the frequencies.
        section: how many frequencies the axes t, h, w have; `None` where there is one axis only.
    """

    def __init__(self, head_dim: int, theta: float, section: Sequence[int] | None) -> None:
        axis = [0] * (head_dim // 2)
        for which in (1, 2) if section is not None else ():
            for i in range(which, min(3 * section[which], len(axis)), 3):
                axis[i] = which
        with torch.device("cpu"):
            self.inv_freq, _ = inverse_frequencies(head_dim, theta)
            self.axis = torch.tensor(axis)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 `[tokens, head_dim / 2]`.

        Args:
            positions: `[tokens]` where all axes agree, as for text, or `[3, tokens]`. Those of
                videos may be fractions.
        """
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
            self.axis = self.axis.to(positions.device)
        places = positions.float()
        places = places.unsqueeze(-1) if places.dim() == 1 else places[self.axis].T
        angle = places * self.inv_freq
        return angle.cos(), angle.sin()
