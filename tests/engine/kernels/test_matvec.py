"""Products of a few rows, and when they are used."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kernels import matvec
from mstar.engine.kernels.matvec import (
    MATVEC,
    matvec_choice,
    matvec_choices,
    matvec_shape,
    matvec_triton,
)
from mstar.engine.layers.linear import linear


def inputs(rows: int, n: int, k: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(s, generator=generator) for s in ((rows, k), (n, k), (n,)))
    return [t.to(device, dtype) for t in tensors]


# Rows, outputs and inputs that do not fill the tiles.
@pytest.mark.parametrize("shape", [(1, 20, 600), (2, 9, 512), (3, 33, 130), (8, 70, 96)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_matches_the_library(shape, biased, triton_device: str) -> None:
    x, weight, bias = inputs(*shape, torch.float32, triton_device)
    expected = x.double() @ weight.double().T + (bias.double() if biased else 0)
    bias = bias if biased else None
    for choice in matvec_choices(len(x)):
        found = matvec_triton(x, weight, bias, choice)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


def test_leading_dimensions_stay(triton_device: str) -> None:
    x, weight, _ = inputs(2, 16, 64, torch.float32, triton_device)
    found = matvec_triton(x.view(2, 1, 64), weight, None, matvec_choices(2)[0])
    torch.testing.assert_close(found, linear(x, weight).view(2, 1, 16), atol=1e-4, rtol=1e-5)


def test_it_is_used_only_where_it_is_faster_than_the_library(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, _ = inputs(2, 16, 64, torch.float16, triton_device)
    found, products = {}, []

    def best(kernel: str, shape: str, choices, run, device):
        assert (kernel, shape) == (MATVEC, matvec_shape(2, weight))
        products.extend(run(choice) for choice in choices)
        return found.get(shape, choices[0])

    monkeypatch.setattr(matvec, "best", best)
    assert matvec_choice(x, weight) is None
    for product in products:
        torch.testing.assert_close(product, products[0], atol=1e-2, rtol=1e-2)
    found[matvec_shape(2, weight)] = matvec_choices(2)[1]
    assert matvec_choice(x, weight) == matvec_choices(2)[1]
    assert len(products) == 2 * (1 + len(matvec_choices(2)))
    # These are no batches of a decode step, or nothing that it could be faster at.
    assert matvec_choice(x.repeat(8, 1), weight) is None
    assert matvec_choice(x[:1].repeat(3, 1), weight) is None
    assert matvec_choice(x.float(), weight.float()) is None
    assert matvec_choice(x, weight.T.contiguous().T) is None


def test_without_a_gpu_nothing_is_measured() -> None:
    pytest.importorskip("triton")
    x, weight, _ = inputs(1, 16, 64, torch.bfloat16, "cpu")
    assert matvec_choice(x, weight) is None


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_model_sizes_on_a_gpu(rows: int) -> None:
    x, weight, bias = inputs(rows, 3072, 8192, torch.bfloat16, "cuda")
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    for choice in matvec_choices(rows):
        found = matvec_triton(x, weight, bias, choice)
        assert (found.double() - exact).norm() < 5e-3 * exact.norm()
