"""Rotary positions in three dimensions, as V-JEPA 2's training code has them.

A third of a head's channels is turned by a token's time, a third by its row, a third by its column;
what is left over is not. Channels are combined in neighbouring pairs, while the list of frequencies
is tiled: the two of a pair turn by different angles, so this is no rotation, and the published
weights need it so. Positions are absolute: nothing may be shifted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.pair_rotary import pair_rotary

__all__ = ["Rotation", "grid_rotation", "rotate", "rotation"]

_BASE = 10000.0


class Rotation(NamedTuple):
    """What tokens' channels are multiplied with, and what their neighbours are: float32 `[tokens,
    head_dim]` or `[batch, tokens, head_dim]`, but for the last of an odd number of channels."""

    own: Tensor
    other: Tensor


def rotation(times: Tensor, rows: Tensor, columns: Tensor, head_dim: int) -> Rotation:
    """The rotation of tokens by their positions, each `[tokens]` or `[batch, tokens]`.

    At position 0 of an axis its channels stay as they are.
    """
    count = head_dim // 3 // 2  # frequencies of an axis, and pairs
    powers = torch.arange(count, dtype=torch.float32, device=times.device) / count
    frequencies = (1.0 / _BASE**powers).repeat(2)
    positions = torch.stack(torch.broadcast_tensors(times, rows, columns), -1)
    angles = (positions.float().unsqueeze(-1) * frequencies).flatten(-2)
    angles = F.pad(angles, (0, head_dim // 2 * 2 - 6 * count))
    other = angles.sin()
    other[..., 0::2] *= -1
    return Rotation(angles.cos(), other)


def grid_rotation(ids: Tensor, rows: int, columns: int, head_dim: int) -> Rotation:
    """The rotation of tokens by their numbers, `[tokens]` or `[batch, tokens]`, in clips of so many
    rows and columns."""
    place = ids % (rows * columns)
    return rotation(ids // (rows * columns), place // columns, place % columns, head_dim)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn heads `[batch, tokens, ..., head_dim]`, in float32."""
    return pair_rotary(x, rotation.own, rotation.other)
