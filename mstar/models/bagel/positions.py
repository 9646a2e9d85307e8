"""Learned 2-D positions: tables of `side * side` rows, one for each place of a square grid."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

__all__ = ["Grid", "PositionTable", "grid_rows"]

Grid = tuple[int, int]  # tokens down and across an image


def grid_rows(table: Tensor, grid: Grid) -> Tensor:
    """The rows `[height * width, hidden]` of an image in the upper left corner of the table.

    Row i and column j of the image is row i * side + j of the table.

    Raises:
        ValueError: the image is larger than the table, or empty.
    """
    side = isqrt(len(table))
    height, width = grid
    if not (0 < height <= side and 0 < width <= side):
        raise ValueError(f"an image of {height} x {width} tokens: a side has 1 to {side}")
    return table.view(side, side, -1)[:height, :width].flatten(0, 1)


class PositionTable(nn.Module):
    """What is added to tokens for where in their image they are; read from the checkpoint."""

    def __init__(self, side: int, hidden_size: int) -> None:
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.empty(side * side, hidden_size))

    def forward(self, grid: Grid) -> Tensor:
        """Rows `[height * width, hidden]`; see `grid_rows`."""
        return grid_rows(self.pos_embed, grid)
