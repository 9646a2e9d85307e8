"""Weights in eight bits: how much memory the same model takes, and how near its answers stay."""

from __future__ import annotations

import numpy as np

from mstar import Engine

clip = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
exact = None
for quantization in (None, "int8", "fp8"):
    with Engine("vjepa2-tiny", quantization=quantization) as engine:
        seen = engine.encode(clip).numpy()
        exact = seen if exact is None else exact
        error = np.abs(seen - exact).mean() / np.abs(exact).mean()
        weights = engine.stats()["memory"]["weights"] / 1024
        print(f"{quantization}: {weights:.0f} KiB of weights, an error of {error:.1%}")
