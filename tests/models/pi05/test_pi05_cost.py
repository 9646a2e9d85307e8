"""The benchmark's costs are those of the published table (bfloat16, 50 actions, 10 steps)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mstar.models.pi05.config import Pi05Config

FILE = Path(__file__).parents[3] / "benchmarks" / "pi05.py"


@pytest.mark.parametrize(
    ("cameras", "text", "vision", "prefix", "flow"),
    [
        (3, 200, 661, 3756, 387),
        (3, 60, 661, 3197, 376),
        (2, 60, 440, 2188, 357),
        (1, 60, 220, 1197, 338),
    ],
)
def test_costs(cameras, text, vision, prefix, flow):
    spec = importlib.util.spec_from_file_location("benchmark_of_pi05", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.cost(Pi05Config(), cameras, text, 2)
    flops = [flops / 1e9 for flops, _ in found.values()]
    assert flops == pytest.approx([vision, prefix, flow], rel=5e-3)
    assert [size / 1e9 for _, size in found.values()] == pytest.approx([0.83, 3.75, 6.23], abs=0.01)
