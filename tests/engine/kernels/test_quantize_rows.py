"""Tokens in 8 bits."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kernels.quantize_rows import (
    FP8,
    quantize_rows_torch,
    quantize_rows_triton,
)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    return x.to(dtype)


# The last is read in two pieces; one row has an end of its own, and there may be none.
SHAPES = [(3, 40), (1, 1), (5, 128), (0, 16), (2, 4100)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_rounds_as_torch_does(shape, dtype, triton_device: str) -> None:
    x = rows(*shape, dtype=dtype).to(triton_device)
    values, scales = quantize_rows_triton(x)
    expected, expected_scales = quantize_rows_torch(x)
    torch.testing.assert_close(scales, expected_scales, rtol=2e-7, atol=0)
    assert torch.equal(values.float(), expected.float())


def test_rows_may_lie_inside_wider_ones_or_be_columns(triton_device: str) -> None:
    wide = rows(4, 100).to(triton_device)
    for x in (wide[:, 10:90], wide.T):
        values, scales = quantize_rows_triton(x)
        expected, expected_scales = quantize_rows_torch(x)
        assert torch.equal(values.float(), expected.float())
        torch.testing.assert_close(scales, expected_scales, rtol=2e-7, atol=0)


@pytest.mark.parametrize(("dtype", "step"), [(FP8, 2**-4), (torch.int8, 0)], ids=str)
def test_the_error_is_at_most_half_a_step(dtype: torch.dtype, step: float) -> None:
    """Of e4m3 relative, or half its least number; of int8 half a 127th of the row's largest."""
    x = rows(50, 64)
    values, scales = quantize_rows_torch(x, dtype)
    least = 2**-10 if dtype == FP8 else 0.5
    error = (values.double() * scales.double()[:, None] - x.double()).abs()
    bound = torch.maximum(x.double().abs() * step, scales.double()[:, None] * least)
    assert (error <= bound * (1 + 1e-6)).all()


def test_zeros_stay_zeros_and_what_is_not_finite_shows(triton_device: str) -> None:
    x = torch.zeros(3, 8, device=triton_device)
    x[1, 3], x[2, 3] = torch.nan, 1e-38
    for quantize in (quantize_rows_torch, quantize_rows_triton):
        values, scales = quantize(x)
        assert (values[0].float() == 0).all()
        assert scales[1].isnan()
        assert scales[0] > 0
        assert values[2].float().isfinite().all()


@pytest.mark.gpu
def test_model_sizes_on_a_gpu() -> None:
    x = rows(300, 8192, dtype=torch.bfloat16).cuda()
    values, scales = quantize_rows_triton(x)
    expected, expected_scales = quantize_rows_torch(x)
    torch.testing.assert_close(scales, expected_scales, rtol=2e-7, atol=0)
    same = values.view(torch.int8) == expected.view(torch.int8)
    assert same.float().mean() > 0.999
