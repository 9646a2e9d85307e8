"""RMS norm, torch and Triton, against float64."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kernels.rms_norm import rms_norm, rms_norm_torch, rms_norm_triton

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [(1, 64), (5, 100), (2, 3, 16), (0, 8), (3, 1, 1536)]


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, shape, shape[-1:])
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = inputs(shape, dtype)
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), reference(x, weight, 1e-5), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    normed, total = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_quotient_is_rounded_before_the_weight(dtype: torch.dtype) -> None:
    x, _, weight = inputs((7, 64), dtype)
    wide = x.float()
    quotient = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), quotient.to(dtype) * weight)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_matches_torch(
    shape: tuple[int, ...], dtype: torch.dtype, triton_device: str
) -> None:
    x, residual, weight = inputs(shape, dtype, triton_device)
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(
        rms_norm_triton(x, weight, 1e-5), rms_norm_torch(x, weight, 1e-5), **tolerance
    )
    normed, total = rms_norm_triton(x, weight, 1e-5, residual)
    expected, expected_total = rms_norm_torch(x, weight, 1e-5, residual)
    # To the bit on a GPU; the interpreter truncates to bfloat16 where hardware rounds.
    torch.testing.assert_close(total, expected_total, atol=0, rtol=2**-7 if x.is_cpu else 0)
    torch.testing.assert_close(normed, expected, **tolerance)


def test_the_kernel_reads_rows_inside_wider_rows(triton_device: str) -> None:
    x, _, weight = inputs((4, 48), torch.float32, triton_device)
    wide = torch.cat([x, x + 1], dim=1)
    narrow = wide[:, 48:]
    expected = rms_norm_torch(narrow, weight, 1e-5, narrow)
    for got, want in zip(rms_norm_triton(narrow, weight, 1e-5, narrow), expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [128, 3072, 8192])
def test_model_sizes_on_a_gpu(hidden: int) -> None:
    x, residual, weight = inputs((300, hidden), torch.bfloat16, "cuda")
    normed, total = rms_norm(x, weight, 1e-5, residual)
    expected, expected_total = rms_norm_torch(x, weight, 1e-5, residual)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(normed, expected, atol=3e-2, rtol=2e-2)
