"""load: what ends up in a network, how much memory that takes, and what is refused."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mstar.engine.weights import Checkpoint, Source, load, randomize
from mstar.errors import WeightsError


class Fused(nn.Module):
    """q, k and v in one matrix; an embedding tied to the head; buffers of each kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.qkv = nn.Linear(4, 8)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(3.0, device="cpu"), persistent=False)
        self.register_buffer("scale", torch.empty(2))

    def sources(self, name):
        if name.startswith("qkv."):
            return (Source((name,)), Source(tuple(name.replace("qkv", x) for x in "qkv")))
        return (Source((name,)),)


def published(dtype=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"embed.weight": (5, 4), "scale": (2,), "unused": (3,)}
    for x, rows in (("q", 4), ("k", 2), ("v", 2)):
        shapes |= {f"{x}.weight": (rows, 4), f"{x}.bias": (rows,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def saved(tensors, folder) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def on_meta(kind, *args):
    with torch.device("meta"):
        return kind(*args)


def test_pieces_are_fused_and_ties_kept(tmp_path):
    tensors = published()
    net = load(on_meta(Fused), saved(tensors, tmp_path), device="cpu", dtype=None)
    assert torch.equal(net.qkv.weight, torch.cat([tensors[f"{x}.weight"] for x in "qkv"]))
    assert torch.equal(net.qkv.bias, torch.cat([tensors[f"{x}.bias"] for x in "qkv"]))
    assert net.head.weight is net.embed.weight
    assert torch.equal(net.embed.weight, tensors["embed.weight"])
    assert torch.equal(net.scale, tensors["scale"])
    assert torch.equal(net.table, torch.arange(3.0))
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


def test_the_first_source_that_is_there_is_taken(tmp_path):
    tensors = published() | {"qkv.weight": torch.ones(8, 4)}
    net = load(on_meta(Fused), saved(tensors, tmp_path), device="cpu", dtype=None)
    assert torch.equal(net.qkv.weight, torch.ones(8, 4))


def test_a_tied_tensor_may_be_stored_under_either_name(tmp_path):
    tensors = published()
    tensors["head.weight"] = tensors.pop("embed.weight")
    net = load(on_meta(Fused), saved(tensors, tmp_path), device="cpu", dtype=None)
    assert torch.equal(net.embed.weight, tensors["head.weight"])


def test_storage_is_cast_to_the_run_dtype(tmp_path):
    tensors = published(torch.bfloat16)
    net = load(on_meta(Fused), saved(tensors, tmp_path), device="cpu", dtype=torch.float32)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.equal(net.embed.weight, tensors["embed.weight"].float())
    assert torch.equal(net.qkv.weight[:4], tensors["q.weight"].float())


def test_none_keeps_the_stored_dtype_and_integers_are_never_cast(tmp_path):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.empty(2))
            self.register_buffer("steps", torch.empty((), dtype=torch.int64))

    tensors = {"w": torch.ones(2, dtype=torch.float16), "steps": torch.tensor(7)}
    checkpoint = saved(tensors, tmp_path)
    net = load(on_meta(Steps), checkpoint, device="cpu", dtype=None)
    assert (net.w.dtype, net.steps.dtype) == (torch.float16, torch.int64)
    net = load(on_meta(Steps), checkpoint, device="cpu", dtype=torch.bfloat16)
    assert (net.w.dtype, net.steps.dtype, int(net.steps)) == (torch.bfloat16, torch.int64, 7)


def test_combine_makes_the_parameter(tmp_path):
    class Flipped(nn.Linear):
        def sources(self, name):
            return (Source((f"old.{name}",), lambda tensors: tensors[0].T),)

    tensors = {"old.weight": torch.randn(3, 2)}
    net = load(on_meta(Flipped, 3, 2, False), saved(tensors, tmp_path), device="cpu", dtype=None)
    assert torch.equal(net.weight, tensors["old.weight"].T)
    with pytest.raises(WeightsError, match=r"weight: found \[2, 3\], expected \[3, 2\]"):
        load(on_meta(Flipped, 2, 3, False), Checkpoint.open(tmp_path), device="cpu", dtype=None)


def test_pieces_stack_into_experts(tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.empty(2, 6, 4))

        def sources(self, name):
            return (Source(tuple(f"{e}.{part}" for e in range(2) for part in ("gate", "up"))),)

    tensors = {f"{e}.{part}": torch.randn(3, 4) for e in range(2) for part in ("gate", "up")}
    net = load(on_meta(Experts), saved(tensors, tmp_path), device="cpu", dtype=None)
    assert torch.equal(net.gate_up[1, 3:], tensors["1.up"])
    assert torch.equal(net.gate_up[0, :3], tensors["0.gate"])


def test_all_faults_are_named_at_once(tmp_path):
    tensors = published()
    del tensors["k.weight"], tensors["scale"]
    tensors["embed.weight"] = torch.ones(4, 5)
    tensors["v.bias"] = torch.ones(3)
    with pytest.raises(WeightsError) as error:
        load(on_meta(Fused), saved(tensors, tmp_path), device="cpu", dtype=None)
    text = str(error.value)
    assert "does not fit Fused" in text
    assert "qkv.weight or k.weight: missing, expected [8, 4]" in text
    assert "scale: missing, expected [2]" in text
    assert "embed.weight: found [4, 5], expected [5, 4]" in text
    assert "q.bias + k.bias + v.bias: found [4] + [2] + [3], expected [8]" in text


def test_a_long_list_of_faults_is_cut(tmp_path):
    net = on_meta(lambda: nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)]))
    with pytest.raises(WeightsError, match=r"\.\.\. and 20 more \(in all 40 missing\)"):
        load(net, saved({"x": torch.ones(1)}, tmp_path), device="cpu", dtype=None)


def test_a_buffer_with_a_value_may_be_absent_and_one_without_may_not(tmp_path):
    class Table(nn.Module):
        def __init__(self, device, persistent):
            super().__init__()
            table = torch.arange(3.0, device=device)
            self.register_buffer("table", table, persistent=persistent)

    checkpoint = saved({"x": torch.ones(1)}, tmp_path)
    net = load(on_meta(Table, "cpu", True), checkpoint, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(net.table, torch.arange(3.0))
    with pytest.raises(WeightsError, match="table has no value"):
        load(on_meta(Table, "meta", False), checkpoint, device="cpu", dtype=None)
    with pytest.raises(WeightsError, match="table: missing"):
        load(on_meta(Table, "meta", True), checkpoint, device="cpu", dtype=None)


def test_progress_counts_tensors(tmp_path):
    seen = []
    load(
        on_meta(Fused),
        saved(published(), tmp_path),
        device="cpu",
        dtype=None,
        progress=lambda *step: seen.append(step),
    )
    assert [step[:2] for step in seen] == [(n, 4) for n in range(1, 5)]
    assert {step[2] for step in seen} == {"embed.weight", "qkv.weight", "qkv.bias", "scale"}


class Counting:
    """A checkpoint of ones that knows how many bytes of what it gave out are still alive."""

    def __init__(self, shapes):
        self.shapes, self.alive, self.peak = shapes, 0, 0

    def __contains__(self, name):
        return name in self.shapes

    def shape(self, name):
        return torch.Size(self.shapes[name])

    def read(self, name):
        tensor = torch.ones(self.shapes[name])
        self.alive += tensor.nbytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor, self._gone, tensor.nbytes)
        return tensor

    def _gone(self, size):
        self.alive -= size


def test_only_one_stored_tensor_is_alive_at_a_time():
    """Also none of them is kept as the parameter: each is copied into its place."""

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 192, bias=False) for _ in range(8))

        def sources(self, name):
            return (Source(tuple(f"{name}.{x}" for x in "qkv")),)

    net = on_meta(Layers)
    checkpoint = Counting({f"layers.{i}.weight.{x}": (64, 64) for i in range(8) for x in "qkv"})
    gc.disable()  # reference counting alone must free the pieces
    try:
        load(net, checkpoint, device="cpu", dtype=torch.bfloat16)
    finally:
        gc.enable()
    assert checkpoint.peak == 64 * 64 * 4
    assert checkpoint.alive == 0
    assert all((layer.weight == 1).all() for layer in net.layers)


def test_loading_twice_from_a_mapped_file_does_not_alias_it(tmp_path):
    checkpoint = saved({"weight": torch.ones(2, 2)}, tmp_path)
    nets = [
        load(on_meta(nn.Linear, 2, 2, False), checkpoint, device="cpu", dtype=None)
        for _ in range(2)
    ]
    nets[0].weight.zero_()
    assert (nets[1].weight == 1).all()


def test_random_weights_need_no_files_and_repeat(tmp_path):
    def make(seed):
        net = on_meta(lambda: nn.Sequential(Fused(), nn.Linear(200, 300), nn.LayerNorm(8)))
        return randomize(net, device="cpu", dtype=torch.bfloat16, seed=seed)

    one, same, other = make(1), make(1), make(2)
    for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one[1].weight, other[1].weight)
    assert one[1].weight.dtype == torch.bfloat16
    assert abs(one[1].weight.float().std() - 0.02) < 1e-3
    assert (one[1].bias == 0).all()
    assert (one[2].weight == 1).all()
    assert one[0].head.weight is one[0].embed.weight
    assert torch.equal(one[0].table, torch.arange(3.0))
    assert not one.training
    assert not one[1].weight.requires_grad
