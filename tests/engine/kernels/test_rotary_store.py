"""Rotation and cache write, torch and Triton, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mstar.engine.kernels.rotary_store import (
    HeadNorms,
    paired_angles,
    rotary_store,
    rotary_store_torch,
    rotary_store_triton,
)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# tokens, heads, kv heads, head_dim, page size
SHAPES = [
    (1, 4, 2, 16, 4),
    (7, 3, 1, 20, 16),
    (5, 2, 2, 64, 1),
    (0, 4, 2, 16, 4),
    (3, 9, 3, 128, 8),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """qkv, cos, sin, zeroed pools for keys and values, distinct slots in no order."""
    tokens, heads, kv_heads, dim, size = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype)
    angles = torch.randn(tokens, dim // 2, generator=generator) * 10
    pages = torch.zeros(tokens // size + 2, size, kv_heads, dim, dtype=dtype)
    slots = torch.randperm(len(pages) * size, generator=generator)[:tokens]
    everything = (qkv, angles.cos(), angles.sin(), pages, pages.clone(), slots)
    return tuple(x.to(device) for x in everything)


def reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    dim: int,
    norms: HeadNorms | None = None,
):
    """Rotated queries and keys in float64, and the values: ``[tokens, heads, dim]`` each."""
    x = qkv.double().view(len(qkv), heads + 2 * kv_heads, dim)
    q, k, v = x.split([heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norms.eps) * weight.double()
            for x, weight in ((q, norms.query), (k, norms.key))
        )

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1)

    return rotate(q), rotate(k), v


def check(
    function,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    normed: bool = False,
) -> None:
    tokens, heads, kv_heads, dim, _ = shape
    qkv, cos, sin, k_pages, v_pages, slots = inputs(shape, dtype, device)
    before = qkv.clone()
    norms = out = None
    if normed:
        weights = torch.linspace(0.5, 1.5, 2 * dim).to(device, dtype)
        norms = HeadNorms(weights[:dim], weights[dim:], 1e-2)
        out = qkv.new_empty(tokens, heads, dim)
    q = function(qkv, cos, sin, k_pages, v_pages, slots, heads, kv_heads, norms, out)
    assert out is None or q is out
    assert q.dtype == dtype
    assert torch.equal(qkv, before)
    expected_q, expected_k, expected_v = reference(qkv, cos, sin, heads, kv_heads, dim, norms)
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(q.double(), expected_q, **tolerance)
    k, v = k_pages.flatten(0, 1), v_pages.flatten(0, 1)
    torch.testing.assert_close(k[slots].double(), expected_k, **tolerance)
    assert torch.equal(v[slots].double(), expected_v)
    untouched = torch.ones(len(k), dtype=torch.bool, device=device)
    untouched[slots] = False
    assert not k[untouched].any()
    assert not v[untouched].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, normed: bool) -> None:
    check(rotary_store, shape, dtype, normed=normed)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_the_kernel_matches_float64(
    shape: tuple[int, ...], dtype: torch.dtype, normed: bool, triton_device: str
) -> None:
    check(rotary_store_triton, shape, dtype, triton_device, normed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paired_angles_give_the_same_bits(shape: tuple[int, ...]) -> None:
    _, heads, kv_heads, _, _ = shape
    qkv, cos, sin, *pool = inputs(shape, torch.float32)
    paired = paired_angles(cos, sin)
    assert paired[1].dim() == 4
    copies = [x.clone() for x in pool]
    q = rotary_store(qkv, *paired, *pool, heads, kv_heads)
    assert torch.equal(q, rotary_store(qkv, cos, sin, *copies, heads, kv_heads))
    assert torch.equal(pool[0], copies[0])


@pytest.mark.parametrize("function", [rotary_store_torch, rotary_store_triton])
def test_writes_into_a_pool_whose_layers_are_interleaved(function, triton_device: str) -> None:
    _, heads, kv_heads, dim, size = shape = SHAPES[1]
    qkv, cos, sin, k_pages, v_pages, slots = inputs(shape, torch.float32, triton_device)
    pool = torch.zeros(len(k_pages), 2, size, kv_heads, dim, device=triton_device)
    q = function(qkv, cos, sin, pool[:, 0], pool[:, 1], slots, heads, kv_heads)
    assert torch.equal(q, function(qkv, cos, sin, k_pages, v_pages, slots, heads, kv_heads))
    assert torch.equal(pool[:, 0], k_pages)
    assert torch.equal(pool[:, 1], v_pages)


def test_the_kernel_does_not_store_padding_rows(triton_device: str) -> None:
    _, heads, kv_heads, _, _ = shape = SHAPES[1]
    qkv, cos, sin, k_pages, v_pages, slots = inputs(shape, torch.float32, triton_device)
    slots[1:] = -1
    rotary_store_triton(qkv, cos, sin, k_pages, v_pages, slots, heads, kv_heads)
    for pages in (k_pages, v_pages):
        rows = pages.flatten(0, 1).abs().sum((1, 2)).nonzero().flatten()
        assert rows.tolist() == slots[:1].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_sizes_on_a_gpu(dtype: torch.dtype) -> None:
    check(rotary_store, (300, 24, 8, 128, 16), dtype, "cuda")
