"""The codecs' activation and depthwise convolution, torch and Triton, against float64."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kernels.snake import (
    depthwise_snake,
    depthwise_snake_triton,
    snake,
    snake_torch,
    snake_triton,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def inputs(
    shape: tuple[int, ...], channels: int, dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    """x, alpha, 1 / beta, taps, bias."""
    generator = torch.Generator().manual_seed(0)
    x, *rest = (torch.randn(s, generator=generator) for s in (shape, (3, channels), (channels, 7)))
    alpha, inverse, bias = rest[0].abs() + 0.2
    return [t.to(device, dtype) for t in (4 * x, alpha, inverse, rest[1], bias)]


def reference(x: torch.Tensor, alpha: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Channels last, in float64."""
    x, alpha, inverse = x.double(), alpha.double(), inverse.double()
    return x + (alpha * x).sin() ** 2 * inverse


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("function", [snake, snake_triton])
def test_matches_float64_wherever_the_channels_are(function, dim, dtype, triton_device) -> None:
    x, alpha, inverse, *_ = inputs((2, 70, 20), 20, dtype, triton_device)
    expected = reference(x, alpha, inverse).movedim(-1, dim)
    before = x.clone()
    found = function(x.movedim(-1, dim), alpha, inverse, dim)
    assert found.dtype == dtype
    assert torch.equal(x, before)
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(found.double(), expected, **tolerance)


@pytest.mark.parametrize("dilation", [1, 9])
@pytest.mark.parametrize("function", [depthwise_snake, depthwise_snake_triton])
def test_the_convolution_sees_zeros_beyond_the_ends(function, dilation, triton_device) -> None:
    x, alpha, inverse, taps, bias = inputs((2, 35, 70), 70, torch.float32, triton_device)
    padded = torch.nn.functional.pad(x.double(), (0, 0, 3 * dilation, 3 * dilation))
    conv = bias.double() + sum(
        padded[:, k * dilation : k * dilation + 35] * taps[:, k].double() for k in range(7)
    )
    found = function(x, taps, bias, dilation, alpha, inverse)
    expected = reference(conv, alpha, inverse)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


def test_nothing_comes_of_nothing(triton_device: str) -> None:
    x, alpha, inverse, taps, bias = inputs((0, 5, 4), 4, torch.float32, triton_device)
    assert snake_triton(x, alpha, inverse).shape == x.shape
    assert depthwise_snake_triton(x, taps, bias, 1, alpha, inverse).shape == x.shape


@pytest.mark.gpu
def test_large_arguments_on_a_gpu() -> None:
    """The sine must not be the GPU's approximate one, which is off far from zero."""
    x, alpha, inverse, *_ = inputs((2, 5000, 96), 96, torch.float32, "cuda")
    found = snake(100 * x, alpha, inverse)
    torch.testing.assert_close(found, snake_torch(100 * x, alpha, inverse), atol=2e-4, rtol=1e-5)
