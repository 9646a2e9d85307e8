"""Gated activations, torch and Triton, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mstar.engine.kernels.gated import gated_torch, gated_triton, gelu_tanh_mul, silu_mul

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}
SHAPES = [(1, 64), (5, 34), (2, 3, 2500), (0, 8)]
PUBLIC = {"silu": silu_mul, "gelu_tanh": gelu_tanh_mul}


def reference(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def gate_up(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", PUBLIC)
def test_matches_float64(activation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = gate_up(shape, dtype)
    before = x.clone()
    out = PUBLIC[activation](x)
    assert out.dtype == dtype
    assert torch.equal(x, before)
    torch.testing.assert_close(
        out.double(), reference(x, activation), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", PUBLIC)
def test_the_kernel_matches_torch(
    activation: str, shape: tuple[int, ...], dtype: torch.dtype, triton_device: str
) -> None:
    x = gate_up(shape, dtype, triton_device)
    torch.testing.assert_close(
        gated_triton(x, activation),
        gated_torch(x, activation),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )


def test_the_kernel_reads_rows_inside_wider_rows(triton_device: str) -> None:
    x = gate_up((4, 60), torch.float32, triton_device)[:, 20:]
    torch.testing.assert_close(
        gated_triton(x, "silu"), gated_torch(x, "silu"), atol=2e-6, rtol=1e-6
    )


@pytest.mark.gpu
@pytest.mark.parametrize("activation", PUBLIC)
def test_model_sizes_on_a_gpu(activation: str) -> None:
    x = gate_up((300, 16384), torch.bfloat16, "cuda")
    torch.testing.assert_close(
        PUBLIC[activation](x), gated_torch(x, activation), atol=3e-2, rtol=2e-2
    )
