"""Rotary positions in neighbouring pairs, torch and Triton, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kernels.pair_rotary import pair_rotary, pair_rotary_torch, pair_rotary_triton

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Shape of the heads, whether each of the batch has tables of its own.
CASES = [((2, 3, 2, 5, 16), False), ((2, 3, 4, 21), True), ((1, 2, 2, 3, 80), True)]


def made(shape, own_tables, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(*shape[:-2], shape[-2] + 1, shape[-1], generator=generator)
    batch = shape[:2] if own_tables else shape[1:2]
    tables = torch.randn(2, *batch, shape[-1] // 2 * 2, generator=generator)
    return wide.to(device, dtype)[..., :-1, :], *tables.to(device)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "own_tables"), CASES, ids=str)
def test_matches_the_formula(shape, own_tables, dtype):
    x, own, other = made(shape, own_tables, dtype)
    expected = x.double().clone()
    for channel in range(own.shape[-1]):
        tables = (t[..., channel].double().expand(shape[:2]) for t in (own, other))
        one, two = (t.view(*shape[:2], *(1 for _ in shape[2:-1])) for t in tables)
        expected[..., channel] = x[..., channel].double() * one + x[..., channel ^ 1].double() * two
    found = pair_rotary(x, own, other)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "own_tables"), CASES, ids=str)
def test_the_kernel_matches_torch(shape, own_tables, dtype, triton_device):
    given = made(shape, own_tables, dtype, triton_device)
    torch.testing.assert_close(
        pair_rotary_triton(*given),
        pair_rotary_torch(*given),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_model_sizes_on_a_gpu(dtype):
    x, own, other = made((2, 1000, 2, 22, 64), False, dtype, "cuda")
    expected = pair_rotary_torch(x.cpu().float(), own.cpu(), other.cpu())
    found = pair_rotary(x, own, other).cpu().float()
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
