"""Weights of 8 bits: how they are loaded, what they take, and that products are the same."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from mstar.engine.layers import quantized
from mstar.engine.layers.linear import linear
from mstar.engine.layers.moe import MoE
from mstar.engine.layers.quantized import Quantization, Quantized, check_quantization
from mstar.engine.weights import Source, load, randomize, weight_bytes
from mstar.errors import InvalidRequest
from tests.engine.test_weights import Counting

KINDS = ["int8", "fp8"]


class Stored:
    """Tensors by name, as a checkpoint."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __contains__(self, name):
        return name in self.tensors

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(make=lambda: MoE(32, 24, 4, 2, shared=16)):
    with torch.device("meta"):
        return make()


def published():
    experts = range(4)
    tensors = {"gate.weight": (4, 32), "shared_expert_gate.weight": (1, 32)}
    names = [*(f"experts.{e}" for e in experts), "shared_expert"]
    for name in names:
        inner = 16 if name == "shared_expert" else 24
        tensors |= {f"{name}.{part}_proj.weight": (inner, 32) for part in ("gate", "up")}
        tensors[f"{name}.down_proj.weight"] = 32, inner
    return {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(tensors.items())}


LAYERS = r"^(gate_up|down|shared_expert\.)"


def loaded(kind, dtype=torch.float32):
    how = None if kind is None else Quantization(kind, LAYERS)
    return load(tiny(), Stored(published()), device="cpu", dtype=dtype, quantization=how)


@pytest.mark.parametrize("kind", KINDS)
def test_named_matrices_are_loaded_in_8_bits(kind):
    plain, net = loaded(None), loaded(kind)
    names = {name for name, layer in net.named_modules() if isinstance(layer, Quantized)}
    parts = ("gate_up_proj.weight", "down_proj.weight")
    assert names == {"gate_up", "down", *(f"shared_expert.{part}" for part in parts)}
    for name in names:
        layer, expected = net.get_submodule(name), plain.get_parameter(name)
        assert layer.values.element_size() == 1
        assert layer.shape == expected.shape
        found = layer.values.float() * layer.scales.unsqueeze(-1)
        assert (found - expected).norm() < 0.03 * expected.norm()
    assert torch.equal(net.gate.weight, plain.gate.weight)
    assert weight_bytes(net) < 0.4 * weight_bytes(plain)


def test_what_is_rounded_are_the_stored_numbers_whatever_the_dtype():
    wide, half = loaded("int8"), loaded("int8", torch.bfloat16)
    assert torch.equal(wide.gate_up.values, half.gate_up.values)
    assert torch.equal(wide.gate_up.scales, half.gate_up.scales)
    assert half.gate.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.02), ("fp8", 0.08)])
def test_results_are_close(kind, least):
    expected, found = (net(normal(9, 32)) for net in (loaded(None), loaded(kind)))
    assert (found - expected).norm() < least * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_layer_is_that_of_its_rounded_parts(kind):
    layer = load(
        tiny(lambda: nn.Linear(40, 24)),
        Stored({"weight": normal(24, 40), "bias": normal(24)}),
        device="cpu",
        dtype=torch.float32,
        quantization=Quantization(kind, "weight"),
    )
    x = normal(2, 3, 40)
    found = linear(x, layer.weight, layer.bias)
    weight = layer.weight.values.double() * layer.weight.scales.double()[:, None]
    if kind == "fp8":
        scales = x.abs().amax(-1, keepdim=True) / 448
        x = (x / scales).to(torch.float8_e4m3fn).double() * scales
    exact = x.double() @ weight.T + layer.bias.double()
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)
    one = linear(normal(2, 3, 40)[1, 2:], layer.weight, layer.bias)  # whatever it is beside
    torch.testing.assert_close(one[0], found[1, 2], atol=1e-5, rtol=1e-5)
    half = linear(x.bfloat16(), layer.weight, layer.bias)
    assert half.dtype == torch.bfloat16
    assert linear(x.float()[:0], layer.weight, layer.bias).shape == (0, 3, 24)


def test_loading_holds_one_stored_tensor_beside_what_is_loaded(monkeypatch):
    """And no wider copy of a stack of experts, nor of anything longer than a strip."""

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.empty(8, 64, 64))

        def sources(self, name):
            return (Source(tuple(f"{e}" for e in range(8))),)

    sizes, empty = [], torch.empty

    def watched(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        sizes.append(tensor.nbytes)
        return tensor

    checkpoint = Counting({f"{e}": (64, 64) for e in range(8)})
    net = tiny(Stack)
    monkeypatch.setattr(torch, "empty", watched)
    gc.disable()
    try:
        how = Quantization("int8", "experts")
        load(net, checkpoint, device="cpu", dtype=torch.bfloat16, quantization=how)
    finally:
        gc.enable()
    assert checkpoint.peak == 64 * 64 * 4
    assert checkpoint.alive == 0
    assert sorted(sizes) == [8 * 64 * 4, 8 * 64 * 64]  # scales, values
    assert (net.experts.values == 127).all()


def test_before_the_first_request_every_height_of_a_tile_was_used(monkeypatch):
    net, seen = loaded("fp8"), []
    quantized.warm_quantized([net], torch.bfloat16)  # nothing, on a CPU
    monkeypatch.setattr(quantized, "use_triton", lambda x: True)
    monkeypatch.setattr(quantized, "quantized_linear", lambda x, weight: seen.append(x.shape))
    quantized.warm_quantized([net, net], torch.bfloat16)
    shared = net.shared_expert
    for matrix in (shared.gate_up_proj.weight, shared.down_proj.weight):
        rows = [shape[0] for shape in seen if shape[1] == matrix.shape[1]]
        assert {min(64, max(16, 1 << (n - 1).bit_length())) for n in rows} == {16, 32, 64}
        assert len(rows) == len(set(rows))
        assert max(rows) > 64


def test_tied_matrices_are_quantised_once_or_not_at_all():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.two.weight = self.one.weight

    both = randomize(
        tiny(Tied), device="cpu", dtype=None, quantization=Quantization("int8", "weight")
    )
    assert isinstance(both.one.weight, Quantized)
    assert both.one.weight is both.two.weight
    one = randomize(tiny(Tied), device="cpu", dtype=None, quantization=Quantization("int8", "one"))
    assert one.one.weight is one.two.weight
    assert isinstance(one.one.weight, nn.Parameter)


def test_random_weights_are_those_that_are_rounded():
    plain = randomize(tiny(), device="cpu", dtype=torch.float32)
    how = Quantization("int8", LAYERS)
    net = randomize(tiny(), device="cpu", dtype=torch.float32, quantization=how)
    found = net.gate_up.values * net.gate_up.scales.unsqueeze(-1)
    assert (found - plain.gate_up).norm() < 0.01 * plain.gate_up.norm()
    assert torch.equal(net.gate.weight, plain.gate.weight)


@pytest.mark.parametrize("kind", ["fp4", "", 8, ["int8"]])
def test_other_kinds_are_refused(kind):
    with pytest.raises(InvalidRequest, match="must be 'int8' or 'fp8', or None") as error:
        check_quantization(kind, torch.device("cpu"))
    assert error.value.field == "quantization"


def test_fp8_needs_a_gpu_that_has_it(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    check_quantization("int8", device)
    with pytest.raises(InvalidRequest, match=r"compute capability 8\.9, this one has 8\.6"):
        check_quantization("fp8", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    check_quantization("fp8", device)
