"""Layer norm, torch and Triton, against float64."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kernels.layer_norm import layer_norm, layer_norm_torch, layer_norm_triton

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}
SHAPES = [(5, 100), (2, 3, 16), (0, 8), (3, 1, 1408)]


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float):
    x = x.double() - x.double().mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """x far from 0, which a variance from sums of squares would not survive; residual, ..."""
    generator = torch.Generator().manual_seed(0)
    x, *rest = (torch.randn(s, generator=generator) for s in (shape, shape, shape[-1:], shape[-1:]))
    return [t.to(device, dtype) for t in (x + 8, *rest)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", [layer_norm, layer_norm_triton])
def test_matches_float64(function, shape, dtype, triton_device: str) -> None:
    x, residual, weight, bias = inputs(shape, dtype, triton_device)
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    out = function(x, weight, bias, 1e-6)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), reference(x, weight, bias, 1e-6), **tolerance)
    normed, total = function(x, weight, bias, 1e-6, residual)
    # To the bit on a GPU; the interpreter truncates to bfloat16 where hardware rounds.
    slack = 2**-7 if x.is_cpu and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(total, x + residual, atol=0, rtol=slack)
    torch.testing.assert_close(normed.double(), reference(total, weight, bias, 1e-6), **tolerance)


def test_the_kernel_reads_rows_inside_wider_rows(triton_device: str) -> None:
    x, _, weight, bias = inputs((4, 48), torch.float32, triton_device)
    narrow = torch.cat([x, x + 1], dim=1)[:, 48:]
    expected = layer_norm_torch(narrow, weight, bias, 1e-5, narrow)
    found = layer_norm_triton(narrow, weight, bias, 1e-5, narrow)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("function", [layer_norm, layer_norm_triton])
def test_weights_may_be_finer_than_what_is_normed(function, triton_device: str) -> None:
    x, residual, weight, bias = inputs((5, 100), torch.float32, triton_device)
    coarse, other = x.bfloat16(), residual.bfloat16()
    out, total = function(coarse, weight, bias, 1e-6, other)
    assert out.dtype == total.dtype == torch.bfloat16
    expected = reference(total, weight, bias, 1e-6)
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=2**-7)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [1152, 1408])
def test_model_sizes_on_a_gpu(hidden: int) -> None:
    x, residual, weight, bias = inputs((300, hidden), torch.bfloat16, "cuda")
    normed, total = layer_norm(x, weight, bias, 1e-6, residual)
    assert torch.equal(total, x + residual)
    expected = reference(total, weight, bias, 1e-6)
    torch.testing.assert_close(normed.double(), expected, atol=3e-2, rtol=2e-2)
