"""Convolutions of codecs with residual and activation, torch and Triton, against float64."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kernels.codec_conv import codec_conv, codec_conv_triton

# inputs, channels, taps, dilation, rate, steps
CASES = {
    "dilated": (13, 20, 7, 3, 0, 40),
    "pointwise": (33, 17, 1, 1, 0, 5),
    "doubled": (10, 6, 10, 1, 5, 9),
    "as many taps": (9, 7, 2, 1, 2, 11),
}


def inputs(case: str, device: str) -> tuple[torch.Tensor, ...]:
    """x (a view with steps before it), weight, bias, alpha, 1 / beta."""
    count, channels, taps, _, rate, steps = CASES[case]
    draw = torch.Generator().manual_seed(0)
    shape = (count, channels, taps) if rate else (channels, count, taps)
    sizes = (2, count, steps + 3), shape, (3, channels)
    x, weight, rest = (torch.randn(size, generator=draw).to(device) for size in sizes)
    return x[:, :, 3:], weight, *rest[:1], *rest[1:].abs().add(0.2)


def reference(case: str, x, weight, bias) -> torch.Tensor:
    """As it is defined, step by step, in float64."""
    _, channels, taps, dilation, rate, steps = CASES[case]
    x, weight = x.double().cpu(), weight.double().cpu()
    if rate:
        y = torch.zeros(len(x), channels, (steps - 1) * rate + taps, dtype=torch.float64)
        for step in range(steps):
            part = torch.einsum("bi,iok->bok", x[:, :, step], weight)
            y[:, :, step * rate : step * rate + taps] += part
        cut = taps - rate
        y = y[:, :, cut : y.shape[2] - cut]
    else:
        y = torch.zeros(len(x), channels, steps, dtype=torch.float64)
        for tap in range(taps):
            back = (taps - 1 - tap) * dilation
            part = torch.einsum("bis,oi->bos", x[:, :, : max(steps - back, 0)], weight[:, :, tap])
            y[:, :, back:] += part
    return y + bias.double().cpu()[:, None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", [codec_conv, codec_conv_triton])
def test_sums_and_activations_match_float64(function, case, triton_device: str) -> None:
    x, weight, bias, alpha, inverse = inputs(case, triton_device)
    dilation, rate = CASES[case][3:5]
    expected = reference(case, x, weight, bias)
    more = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    plain, none = function(x, weight, bias, dilation=dilation, rate=rate)
    assert none is None
    torch.testing.assert_close(plain.double().cpu(), expected, atol=2e-5, rtol=1e-5)
    found, active = function(
        x,
        weight,
        bias,
        dilation=dilation,
        rate=rate,
        residual=more.to(triton_device),
        activation=(alpha, inverse),
    )
    expected += more.double()
    torch.testing.assert_close(found.double().cpu(), expected, atol=2e-5, rtol=1e-5)
    a, b = (v.double().cpu()[:, None] for v in (alpha, inverse))
    waves = expected + (a * expected).sin() ** 2 * b
    torch.testing.assert_close(active.double().cpu(), waves, atol=1e-4, rtol=1e-4)


def test_nothing_comes_of_nothing(triton_device: str) -> None:
    x, weight, bias, *_ = inputs("doubled", triton_device)
    found, _ = codec_conv_triton(x[:, :, :1], weight, bias, rate=5)
    assert found.shape == (2, 6, 0)


@pytest.mark.gpu
def test_products_on_a_gpu_are_as_precise_as_float32() -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    sizes = (2, 384, 500), (384, 384, 7), (384,)
    x, weight, bias = (torch.randn(size, generator=draw, device="cuda") for size in sizes)
    found, _ = codec_conv(x, weight, bias, dilation=9)
    padded = torch.nn.functional.pad(x.double(), (54, 0))
    exact = torch.nn.functional.conv1d(padded, weight.double(), bias.double(), dilation=9)
    assert float((found - exact).norm() / exact.norm()) < 2e-6
