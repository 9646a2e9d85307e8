"""A map of costs as a picture: dark where it costs least, with a cross at the lowest point."""

from __future__ import annotations

import io
import math

import numpy as np

from mstar.io.plot import ticks

__all__ = ["plot_energy"]

_SIDE, _BAR = 360, 14  # pixels: the map, and the width of the bar of colours
_MARGIN = (64, 30, 90, 50)  # left, top, right, bottom
_SCALE = 2  # drawn larger and made smaller: lines are smooth
_AXIS, _TEXT, _MARK = (90, 90, 90), (30, 30, 30), (230, 60, 40)
_COLOURS = np.array(  # from low to high
    [(20, 24, 74), (31, 95, 191), (84, 176, 190), (190, 222, 170), (250, 243, 210)], float
)


def plot_energy(costs: np.ndarray, axes: str, span: float, title: str = "cost") -> bytes:
    """A PNG of a map.

    Args:
        costs: `[points, points]`, square; the first dimension goes to the right, the second up.
        axes: two letters, to name them.
        span: from the middle to either side, in metres.
        title: of what is drawn.

    Raises:
        ValueError: there is nothing to draw.
    """
    from PIL import Image, ImageDraw, ImageFont

    if (
        costs.ndim != 2
        or costs.shape[0] != costs.shape[1]
        or len(costs) < 2
        or not np.isfinite(costs).all()
    ):
        raise ValueError(f"cannot draw a map of shape {list(costs.shape)}")
    low, high = float(costs.min()), float(costs.max())
    left, top, right, bottom = (margin * _SCALE for margin in _MARGIN)
    side, bar = _SIDE * _SCALE, _BAR * _SCALE
    image = Image.new("RGB", (left + side + right, top + side + bottom), "white")
    draw = ImageDraw.Draw(image)
    font, bold = (ImageFont.load_default(size * _SCALE) for size in (11, 13))

    shares = (costs.T[::-1] - low) / max(high - low, 1e-12)
    field = Image.fromarray(shares.astype(np.float32))
    field = np.asarray(field.resize((side, side), Image.Resampling.BILINEAR))
    image.paste(_coloured(field), (left, top))
    strip = np.linspace(1, 0, side)[:, None].repeat(bar, 1)
    image.paste(_coloured(strip), (left + side + bar, top))
    for value, down in ((high, top), (low, top + side)):
        place = left + side + 2 * bar + 4 * _SCALE, down
        draw.text(place, f"{value:.4g}", _TEXT, font, anchor="lm")

    end = top + side
    for mark in ticks(-span, span, 7):
        away = ((mark + span) / (2 * span) * (len(costs) - 1) + 0.5) / len(costs) * side
        label = f"{mark:.{max(0, 1 - math.floor(math.log10(span)))}f}"
        draw.line([(left + away, end), (left + away, end + 4 * _SCALE)], _AXIS, _SCALE)
        draw.text((left + away, end + 6 * _SCALE), label, _TEXT, font, anchor="mt")
        draw.line([(left - 4 * _SCALE, end - away), (left, end - away)], _AXIS, _SCALE)
        draw.text((left - 6 * _SCALE, end - away), label, _TEXT, font, anchor="rm")
    draw.rectangle([left, top, left + side, end], outline=_AXIS, width=_SCALE)

    best = np.unravel_index(int(costs.argmin()), costs.shape)
    x, y = ((place + 0.5) / count * side for place, count in zip(best, costs.shape, strict=True))
    arm = 6 * _SCALE
    for across in (((-arm, 0), (arm, 0)), ((0, -arm), (0, arm))):
        draw.line([(left + x + dx, end - y + dy) for dx, dy in across], _MARK, 2 * _SCALE)
    draw.text((left, top - 8 * _SCALE), title, _TEXT, bold, anchor="lb")
    place = left + side, end + 30 * _SCALE
    draw.text(place, f"{axes[0]} to the right, {axes[1]} up, in m", _AXIS, font, anchor="rb")
    out = io.BytesIO()
    image.reduce(_SCALE).save(out, "PNG")
    return out.getvalue()


def _coloured(shares: np.ndarray):
    """An image of numbers from 0 to 1."""
    from PIL import Image

    steps = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(shares, steps, column) for column in _COLOURS.T]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))
