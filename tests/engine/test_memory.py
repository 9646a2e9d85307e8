"""How much there is, and what running out of it looks like."""

import pytest
import torch
from torch import nn

from mstar import Engine
from mstar.engine.feature_cache import FeatureCache
from mstar.engine.kvcache import KVLayout
from mstar.engine.memory import free_bytes, is_out_of_memory, kv_tokens_for, memory_stats
from mstar.engine.node import Node

CPU = torch.device("cpu")


def test_free_memory_is_a_plausible_number():
    assert 64 << 20 < free_bytes(CPU) < 1 << 50


def test_the_cache_takes_a_share_of_the_free_memory_and_no_more_than_is_of_use():
    layout = KVLayout(layers=28, kv_heads=8, head_dim=128)
    assert layout.bytes_per_token(torch.bfloat16) == 114688  # the cost table of the reference
    some, more = (
        kv_tokens_for(layout, CPU, torch.bfloat16, fraction=share, at_most=1 << 40)
        for share in (0.2, 0.8)
    )
    assert some < more
    assert more * 114688 < free_bytes(CPU)
    assert kv_tokens_for(layout, CPU, torch.bfloat16, fraction=0.9, at_most=2048) == 2048


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_only_a_lack_of_memory_is_worth_a_smaller_batch(error, answer):
    assert is_out_of_memory(error) is answer


def test_what_is_shared_counts_once():
    table, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = table.weight
    cache = FeatureCache(1000)
    cache.put("a", torch.zeros(5))
    stats = memory_stats(CPU, [table, head], [Node("plain", list)], cache)
    kinds = {"weights": 160, "kv_cache": 0, "features": 20, "graphs": 0, "workspace": 0}
    assert stats == kinds


def test_on_a_gpu_the_kinds_add_up_to_what_is_reserved(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: {gpu: 5000}[device])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: ({gpu: 900}[device], 9000))
    monkeypatch.setattr("mstar.engine.memory.graph_bytes", lambda device: {gpu: 700}[device])
    stats = memory_stats(gpu, [nn.Linear(10, 10, bias=False)], [], None)
    assert (stats.pop("reserved"), stats.pop("free")) == (5000, 900)
    assert stats == {
        "weights": 400,
        "kv_cache": 0,
        "features": 0,
        "graphs": 700,
        "workspace": 3900,
    }
    assert sum(stats.values()) == 5000


def test_an_engine_tells_what_its_memory_holds():
    with Engine("bagel-tiny", kv_tokens=1024) as engine:
        found = engine.stats()["memory"]
        parts = engine.model.networks
        assert found["weights"] == sum(p.nbytes for net in parts for p in net.parameters())
        assert found["kv_cache"] == engine.model.lm.pool.tensor.nbytes
