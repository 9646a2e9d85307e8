"""Products with weights of 8 bits: the kernel, the library, plain torch."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kernels import scaled_product as file
from mstar.engine.kernels.quantize_rows import FP8, quantize_rows_torch
from mstar.engine.kernels.scaled_product import (
    library_takes,
    scaled_product_library,
    scaled_product_torch,
    scaled_product_triton,
)

# x and weight: int8 and e4m3 weights with floating-point inputs, and both sides e4m3.
KINDS = [(torch.float32, torch.int8), (torch.float16, FP8), (FP8, FP8)]


def given(rows: int, outputs: int, inputs: int, x_dtype, dtype, device="cpu", biased=True):
    """Arguments, and the result in float64."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs))
    bias = torch.randn(outputs, generator=generator) if biased else None
    weight, scales = quantize_rows_torch(weight, dtype)
    x, x_scales = quantize_rows_torch(x) if x_dtype == FP8 else (x.to(x_dtype), None)
    out = torch.float32 if x_dtype == FP8 else x_dtype
    exact = x.double() @ (weight.double() * scales.double()[:, None]).T
    exact = exact if x_scales is None else exact * x_scales.double()[:, None]
    exact = exact if bias is None else exact + bias.double()
    moved = [t if t is None else t.to(device) for t in (x, weight, scales, bias, x_scales)]
    return [*moved, out], exact.to(device)


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    least = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}[found.dtype]
    assert (found.double() - exact).norm() <= least * exact.norm()


# Rows, outputs and inputs that do not fill the tiles; more rows than a tile has; no rows.
SHAPES = [(1, 20, 600), (5, 33, 130), (20, 70, 96), (70, 40, 33), (0, 16, 16)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_gives_the_product(shape, kind, triton_device: str) -> None:
    arguments, exact = given(*shape, *kind, triton_device, biased=shape[0] != 5)
    close(scaled_product_torch(*arguments), exact)
    close(scaled_product_triton(*arguments), exact)


@pytest.mark.parametrize("choice", file._TILES[1:], ids=str)
def test_every_tile_gives_the_product(choice, triton_device: str) -> None:
    arguments, exact = given(3, 40, 300, FP8, FP8, triton_device)
    close(scaled_product_triton(*arguments, choice), exact)


def test_inputs_need_not_be_contiguous(triton_device: str) -> None:
    arguments, exact = given(6, 20, 40, torch.float32, torch.int8, triton_device)
    arguments[0] = arguments[0].T.contiguous().T
    close(scaled_product_torch(*arguments), exact)
    close(scaled_product_triton(*arguments), exact)


@pytest.mark.parametrize("kind", [(torch.bfloat16, torch.int8), (FP8, FP8)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_the_library_gives_the_product_of_many_rows(kind, biased: bool) -> None:
    arguments, exact = given(80, 48, 64, *kind, biased=biased)
    arguments[-1] = torch.bfloat16
    if biased:
        arguments[3] = arguments[3].bfloat16()
    close(scaled_product_library(*arguments), exact)


def test_what_the_library_takes() -> None:
    eight, odd = torch.zeros(16, 32, dtype=FP8), torch.zeros(16, 33, dtype=FP8)
    assert library_takes(eight, torch.bfloat16)
    assert not library_takes(odd, torch.bfloat16)
    assert library_takes(odd.to(torch.int8), torch.bfloat16)
    assert not library_takes(eight.to(torch.int8), torch.float16)


def test_without_products_of_fp8_rows_in_the_library_the_kernel_takes_all(monkeypatch) -> None:
    def fails(*_, **__):
        raise RuntimeError("torch._scaled_mm: row-wise scaling is not supported here")

    monkeypatch.setattr(torch, "_scaled_mm", fails)
    file._library_scales_rows.cache_clear()
    try:
        weight = torch.zeros(16, 32, dtype=FP8)
        assert not library_takes(weight, torch.bfloat16)
        assert library_takes(weight.to(torch.int8), torch.bfloat16)
    finally:
        file._library_scales_rows.cache_clear()


def test_a_strip_of_the_weight_is_widened_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, exact = given(4, 50, 64, FP8, FP8)
    widened = []
    wide = file._wide
    monkeypatch.setattr(file, "_STRIP", 64 * 7)
    monkeypatch.setattr(file, "_wide", lambda x: widened.append(len(x)) or wide(x))
    close(scaled_product_torch(*arguments), exact)
    assert widened == [4, *[7] * 7, 1]


def test_e4m3_is_widened_without_loss() -> None:
    every = torch.arange(256).to(torch.uint8).view(FP8)
    number = every.float().isfinite()
    assert torch.equal(file._wide(every)[number], every.float()[number])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 64, 300])
@pytest.mark.parametrize("kind", [(torch.bfloat16, torch.int8), (FP8, FP8)], ids=str)
def test_model_sizes_on_a_gpu(rows: int, kind) -> None:
    if kind[0] == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 here")
    arguments, exact = given(rows, 3072, 8192, *kind, "cuda", biased=False)
    arguments[-1] = torch.bfloat16
    close(file.scaled_product(*arguments), exact)
