"""The modulated norm: torch and Triton, against float64."""

from __future__ import annotations

import os

import pytest
import torch

from mstar.engine.kernels.ada_norm import ada_norm, ada_norm_torch, ada_norm_triton

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-2}
# Shapes of x, and of what modulates it.
SHAPES = [((2, 5, 64), (1, 1, 64)), ((2, 3, 100), (2, 1, 100)), ((2, 3, 48), (1, 3, 48))]

interpreted = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or Triton's interpreter",
)


def inputs(shape, small, dtype):
    dice = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, added = (torch.randn(shape, generator=dice).to(device, dtype) for _ in range(2))
    norm = torch.randn(*small[:2], 3, small[2], generator=dice).to(device)
    return x, added, *norm.unbind(2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "small"), SHAPES)
def test_matches_float64(shape, small, dtype):
    x, added, scale, shift, gate = inputs(shape, small, dtype)
    normed, total = ada_norm(x, scale, shift, 1e-6, added, gate)
    assert normed.dtype == total.dtype == dtype
    near = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    wide = x.double() + gate.double() * added.double()
    torch.testing.assert_close(total.double(), wide, **near)
    wide = total.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(normed.double(), expected * scale + shift, **near)
    alone, same = ada_norm(total, scale, shift, 1e-6)
    assert same.equal(total)
    assert alone.equal(normed)


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "small"), SHAPES)
def test_the_kernel_matches_torch(shape, small, dtype):
    x, added, scale, shift, gate = inputs(shape, small, dtype)
    near = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    for more in ((), (added, gate)):
        found = ada_norm_triton(x, scale, shift, 1e-6, *more)
        expected = ada_norm_torch(x, scale, shift, 1e-6, *more)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **near)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_model_sizes_on_a_gpu(dtype):
    x, added, scale, shift, gate = inputs((16, 256, 1024), (16, 1, 1024), dtype)
    normed, total = ada_norm(x, scale, shift, 1e-6, added, gate)
    near = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(total.double(), x.double() + gate * added.double(), **near)
    wide = total.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale + shift
    torch.testing.assert_close(normed.double(), expected, **near)
