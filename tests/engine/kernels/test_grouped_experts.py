"""Grouped products of a mixture of experts, and the order that they put tokens into."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kernels.expert_blocks import (
    block_count,
    expert_blocks_torch,
    expert_blocks_triton,
)
from mstar.engine.kernels.grouped_experts import (
    block_rows,
    grouped_experts_triton,
    token_counts,
)
from mstar.engine.kernels.route import route_torch, route_triton
from mstar.engine.layers.moe import experts_grouped, experts_loop, route, run_experts
from mstar.engine.layers.quantized import Quantized

# items, experts, rows of a block, what is chosen: anything below it
ROUTINGS = [(1, 1, 16, 1), (40, 5, 4, 5), (1500, 7, 16, 3), (33, 128, 16, 128), (0, 4, 16, 4)]


def chosen(items: int, below: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(below, (items,), generator=torch.Generator().manual_seed(0)).to(device)


def layer(
    tokens: int, experts: int, top_k: int, dtype: torch.dtype, device: str, hidden=40, inner=24
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, hidden), (experts, 2 * inner, hidden), (experts, hidden, inner))
    x, gate_up, down = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    weights, experts = route(torch.randn(tokens, experts, generator=generator), top_k)
    return [x, weights.to(device), experts.to(device), gate_up / 4, down / 4]


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_every_item_is_in_a_block_of_its_expert_in_order(routing: tuple[int, ...]) -> None:
    items, count, size, below = routing
    experts = chosen(items, below)
    rows, owner = expert_blocks_torch(experts, count, size)
    assert len(owner) == block_count(items, count, size)
    for expert in range(count):
        own = rows.view(-1, size)[owner == expert].flatten()
        expected = (experts == expert).nonzero().flatten().int()
        assert torch.equal(own[: len(expected)], expected)
        assert len(own) - len(expected) < size
        assert (own[len(expected) :] == items).all()


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_the_kernel_lays_out_the_same_blocks(routing: tuple[int, ...], triton_device: str) -> None:
    items, count, size, below = routing
    experts = chosen(items, below, triton_device)
    rows, owner = expert_blocks_triton(experts, count, size)
    expected_rows, expected_owner = expert_blocks_torch(experts, count, size)
    assert torch.equal(owner, expected_owner)
    needed = owner < count
    found = rows.view(-1, size)[needed]
    assert torch.equal(found, expected_rows.view(-1, size)[needed])


# A token alone, a few, a block per expert, many blocks of some experts; odd widths.
@pytest.mark.parametrize("shape", [(1, 5, 3), (4, 8, 2), (9, 6, 2), (90, 4, 2), (0, 4, 2)], ids=str)
def test_the_products_match_one_expert_after_the_other(
    shape: tuple[int, ...], triton_device: str
) -> None:
    given = layer(*shape, torch.float32, triton_device)
    torch.testing.assert_close(
        grouped_experts_triton(*given), experts_loop(*given), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("shape", [(2, 5, 3), (20, 4, 2)], ids=str)
def test_experts_of_8_bits_are_those_they_stand_for(shape, kind: str, triton_device: str) -> None:
    *given, gate_up, down = layer(*shape, torch.float32, triton_device)
    eight = []
    for matrix in (gate_up, down):
        eight.append(Quantized.empty(matrix.shape, kind, triton_device))
        eight[-1].fill(0, matrix)
    stand_for = [x.values.float() * x.scales.unsqueeze(-1) for x in eight]
    expected = experts_loop(*given, *stand_for)
    values, scales = ([getattr(x, name) for x in eight] for name in ("values", "scales"))
    for found in (
        run_experts(*given, *eight),
        experts_grouped(*given, *eight),
        grouped_experts_triton(*given, *values, scales),
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [2, 20])
def test_in_half_precision_sums_are_float32(tokens: int, triton_device: str) -> None:
    given = layer(tokens, 4, 2, torch.float16, triton_device)  # the interpreter's dot: no bfloat16
    exact = experts_loop(*(t.double() if t.is_floating_point() else t for t in given))
    found = grouped_experts_triton(*given)
    assert found.dtype == torch.float16
    assert (found.double() - exact).norm() < 1e-3 * exact.norm()


def test_rows_inside_wider_rows_are_read(triton_device: str) -> None:
    x, *rest = layer(6, 4, 2, torch.float32, triton_device)
    wide = torch.cat([x, x + 1], 1)[:, : x.shape[1]]
    assert torch.equal(grouped_experts_triton(wide, *rest), grouped_experts_triton(x, *rest))


@pytest.mark.parametrize(("share", "rows"), [(0, 16), (20, 32), (64, 64), (4000, 128)])
def test_blocks_are_as_high_as_experts_have_items(share: int, rows: int) -> None:
    assert block_rows(share * 128, 128) == rows


def test_a_few_numbers_of_tokens_need_every_kind_of_block() -> None:
    counts = token_counts(8, 128, 4096)
    assert counts[:2] == [1, 5]  # each token alone, and no more
    assert {block_rows(8 * n, 128) for n in counts[1:]} == {16, 32, 64, 128}
    assert token_counts(8, 128, 300) == counts[:3]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("shape", [(7, 20, 3), (2, 128, 8), (3, 4, 1), (0, 4, 2)], ids=str)
def test_the_router_is_one_kernel(shape, normalise: bool, triton_device: str) -> None:
    tokens, count, top_k = shape
    logits = 3 * torch.randn(tokens, count, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        given = logits.to(triton_device, dtype)
        weights, experts = route_triton(given, top_k, normalise=normalise)
        expected, _ = route_torch(given, top_k, normalise=normalise)
        torch.testing.assert_close(weights, expected)  # equal scores may be swapped
        assert all(len(row.unique()) == top_k for row in experts)
        shares = given.double().softmax(-1).gather(1, experts)
        if normalise:
            shares = shares / shares.sum(-1, keepdim=True)
        torch.testing.assert_close(weights.double(), shares, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_router_names_experts_that_there_are_even_of_nan(triton_device: str) -> None:
    logits = torch.full((2, 5), torch.nan, device=triton_device)
    _, experts = route_triton(logits, 2)
    assert ((experts >= 0) & (experts < 5)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 64, 700])
def test_model_sizes_on_a_gpu(tokens: int) -> None:
    given = layer(tokens, 128, 8, torch.bfloat16, "cuda", hidden=2048, inner=768)
    exact = experts_grouped(*(t.double() if t.is_floating_point() else t for t in given))
    found = run_experts(*given)
    assert (found.double() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.gpu
def test_a_captured_graph_serves_every_routing() -> None:
    given = layer(32, 16, 4, torch.bfloat16, "cuda", hidden=256, inner=128)
    for _ in range(2):
        run_experts(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_experts(*given)
    for below in (16, 3):
        given[2].copy_(torch.rand(32, below, device="cuda").argsort(-1)[:, :4] % below)
        graph.replay()
        torch.testing.assert_close(out, run_experts(*given), atol=0, rtol=0)


@pytest.mark.gpu
def test_the_router_of_model_size_on_a_gpu() -> None:
    logits = 3 * torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))
    logits = logits.to("cuda", torch.bfloat16)
    weights, experts = route(logits, 8)
    shares = logits.double().softmax(-1).gather(1, experts)
    expected = shares / shares.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(shares, logits.double().softmax(-1).topk(8)[0])
