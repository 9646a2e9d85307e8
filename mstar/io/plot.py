"""Actions as a picture: how every dimension of a chunk goes, each in a panel of its own."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

__all__ = ["plot_actions", "ticks"]

_PANEL = (300, 190)  # pixels
_MARGIN = (56, 34, 14, 36)  # of a panel, for its labels: left, top, right, bottom
_MOST = 64  # panels
_SCALE = 2  # drawn larger and made smaller: lines are smooth
_LINE, _AXIS, _GRID, _TEXT = (31, 95, 191), (90, 90, 90), (228, 228, 228), (30, 30, 30)


def plot_actions(actions: np.ndarray) -> bytes:
    """A PNG of actions `[rows, dims]`; of more than 64 dimensions, the first 64.

    Raises:
        ValueError: there is nothing to draw.
    """
    from PIL import Image, ImageDraw

    if actions.ndim != 2 or not actions.size or not np.isfinite(actions).all():
        raise ValueError(f"cannot draw actions of shape {list(actions.shape)}")
    dims = min(actions.shape[1], _MOST)
    columns = min(dims, max(1, round(math.sqrt(dims))))
    lines = math.ceil(dims / columns)
    size = columns * _PANEL[0] * _SCALE, lines * _PANEL[1] * _SCALE
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for dim in range(dims):
        corner = (dim % columns) * _PANEL[0], (dim // columns) * _PANEL[1]
        _panel(draw, corner, actions[:, dim].astype(float), f"action {dim}")
    out = io.BytesIO()
    image.reduce(_SCALE).save(out, "PNG")
    return out.getvalue()


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most so many: 1, 2 or 5 times a power of ten apart."""
    if not high > low or most < 2:
        return [low]
    least = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _panel(draw: ImageDraw, corner: tuple[int, int], values: np.ndarray, title: str) -> None:
    from PIL import ImageFont

    font, bold = (ImageFont.load_default(size * _SCALE) for size in (11, 13))
    left, top = ((corner[i] + _MARGIN[i]) * _SCALE for i in (0, 1))
    right, bottom = ((corner[i] + _PANEL[i] - _MARGIN[i + 2]) * _SCALE for i in (0, 1))
    low, high = float(values.min()), float(values.max())
    room = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-3) * 0.08
    low, high = low - room, high + room
    last = max(len(values) - 1, 1)

    def x(row: float) -> float:
        return left + (right - left) * row / last

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    marks = ticks(low, high, 7)
    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9)) if len(marks) > 1 else 3
    for value in marks:
        draw.line([(left, y(value)), (right, y(value))], _GRID, _SCALE)
        place = left - 5 * _SCALE, y(value)
        label = f"{value:.{digits}f}" if digits <= 4 and abs(value) < 1e7 else f"{value:.3g}"
        draw.text(place, label, _TEXT, font, anchor="rm")
    for row in ticks(0, last, 6):
        if row == int(row):
            draw.line([(x(row), bottom), (x(row), bottom + 4 * _SCALE)], _AXIS, _SCALE)
            place = x(row), bottom + 6 * _SCALE
            draw.text(place, f"{row:.0f}", _TEXT, font, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], _AXIS, _SCALE)
    points = [(x(row), y(value)) for row, value in enumerate(values)]
    draw.line(points, _LINE, 2 * _SCALE, joint="curve")
    if len(points) <= 60:
        for across, down in points:
            spot = 2.2 * _SCALE
            box = across - spot, down - spot, across + spot, down + spot
            draw.ellipse(box, _LINE)
    draw.text((left, top - 8 * _SCALE), title, _TEXT, bold, anchor="lb")
    draw.text((right, bottom + 30 * _SCALE), "control step", _AXIS, font, anchor="rb")
