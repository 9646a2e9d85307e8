"""Ways to run a mixture of experts, against one expert after the other."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.layers import moe
from mstar.engine.layers.moe import MoE, experts_grouped, experts_loop, route


@pytest.mark.parametrize("tokens", [0, 1, 3, 64])
@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_tokens_in_the_order_of_their_experts_give_the_same(tokens, top_k):
    torch.manual_seed(tokens + top_k)
    x, gate_up, down = torch.randn(tokens, 12), torch.randn(7, 20, 12), torch.randn(7, 12, 10)
    weights, experts = route(torch.randn(tokens, 7), top_k)
    given = x, weights, experts, gate_up, down
    torch.testing.assert_close(experts_grouped(*given), experts_loop(*given), atol=1e-4, rtol=1e-4)


def test_bfloat16():
    torch.manual_seed(0)
    x = torch.randn(5, 16).bfloat16()
    gate_up, down = torch.randn(4, 16, 16).bfloat16(), torch.randn(4, 16, 8).bfloat16()
    weights, experts = route(torch.randn(5, 4), 2)
    given = x, weights, experts, gate_up, down
    exact = experts_loop(*(t.float() if t.is_floating_point() else t for t in given))
    found = experts_grouped(*given)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.02 * exact.norm()


def test_weights_add_up_to_one_only_if_asked():
    logits = torch.randn(6, 9)
    shares, experts = route(logits, 3, normalise=False)
    assert torch.equal(shares, logits.softmax(-1).gather(1, experts))
    weights, same = route(logits, 3)
    assert torch.equal(experts, same)
    torch.testing.assert_close(weights, shares / shares.sum(-1, keepdim=True))


def layer_of(shared, **options):
    torch.manual_seed(0)
    layer = MoE(8, 6, 4, 2, shared=shared, **options).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_()
    return layer


@pytest.mark.parametrize("most", [-1, 1 << 21])  # products up to which they run together
def test_the_shared_expert_is_added_as_its_gate_says(most, monkeypatch):
    monkeypatch.setattr(moe, "_FEW", most)
    layer, x = layer_of(10), torch.randn(5, 8)
    weights, experts = route(layer.gate(x), 2)
    routed = experts_loop(x, weights, experts, layer.gate_up, layer.down)
    shared = layer.shared_expert_gate(x).sigmoid() * layer.shared_expert(x)
    torch.testing.assert_close(layer(x), routed + shared)


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shared", "normalise"), [(0, True), (10, False)])
def test_small_experts_run_together_and_give_the_same(
    tokens, dtype, shared, normalise, monkeypatch
):
    layer, x = layer_of(shared, normalise=normalise).to(dtype), torch.randn(tokens, 8).to(dtype)
    together = layer(x)
    monkeypatch.setattr(moe, "_FEW", -1)
    apart = layer_of(shared, normalise=normalise).to(dtype)(x)
    assert together.dtype == dtype
    bound = {} if dtype == torch.float32 else {"atol": 0.5, "rtol": 0.05}
    torch.testing.assert_close(together, apart, **bound)
