"""Maps of costs as pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mstar.io.heatmap import plot_energy


def test_the_lowest_point_is_marked_and_dark():
    """To the right is the first axis, up the second."""
    costs = np.ones((5, 5), np.float32)
    costs[4, 1] = 0.5
    image = np.asarray(Image.open(io.BytesIO(plot_energy(costs, "xz", 0.05))).convert("RGB"))
    field = image[30:390, 64:424].astype(int)
    red = (field[..., 0] > 200) & (field[..., 1] < 120)
    down, right = (np.flatnonzero(red.any(axis)).mean() / 360 for axis in (1, 0))
    assert right == pytest.approx(0.9, abs=0.03)
    assert down == pytest.approx(0.7, abs=0.03)
    assert field[240, 320].sum() < field[60, 60].sum()


@pytest.mark.parametrize("costs", [np.ones((3, 3)), np.eye(2) * 1e-9])
def test_flat_maps_are_drawn_too(costs):
    assert plot_energy(costs, "xy", 0.075).startswith(b"\x89PNG")


@pytest.mark.parametrize("costs", [np.ones(3), np.ones((1, 1)), np.full((2, 2), np.nan)])
def test_what_is_no_map_is_refused(costs):
    with pytest.raises(ValueError, match="cannot draw"):
        plot_energy(costs, "xy", 0.075)
