"""How far latents are from a goal, torch and Triton, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mstar.engine.kernels.l1_cost import l1_cost, l1_cost_torch, l1_cost_triton

SHAPES = [(1, 1, 5), (3, 33, 66), (2, 40, 130), (0, 4, 8)]
NEAR = {torch.float32: 1e-6, torch.bfloat16: 1e-6}  # of what is stored, all is computed in float32


def latents(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator) + 1
    goal = torch.randn(shape[1:], generator=generator)
    return x.to(device, dtype), goal.to(device, dtype)


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_match_float64(shape, dtype, eps, triton_device):
    x, goal = latents(shape, dtype, triton_device)
    wide = x.double() if eps is None else F.layer_norm(x.double(), x.shape[-1:], eps=eps)
    expected = (wide - goal.double()).abs().mean((1, 2))
    for found in (l1_cost_torch(x, goal, eps), l1_cost_triton(x, goal, eps)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=NEAR[dtype], rtol=2e-6)


def test_nothing_is_written_to():
    x, goal = latents((2, 3, 8), torch.float32)
    before = x.clone(), goal.clone()
    l1_cost(x, goal, 1e-5)
    l1_cost(x, goal, None)
    assert torch.equal(x, before[0])
    assert torch.equal(goal, before[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_model_sizes_on_a_gpu(dtype):
    x, goal = latents((33, 256, 1408), dtype, "cuda")
    wide = F.layer_norm(x.double(), x.shape[-1:], eps=1e-5)
    expected = (wide - goal.double()).abs().mean((1, 2))
    torch.testing.assert_close(l1_cost(x, goal, 1e-5).double(), expected, atol=1e-5, rtol=1e-5)
