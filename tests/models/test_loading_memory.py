"""Loading a model takes the memory of its weights, and for a while that of one parameter more."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from mstar.engine.checkpoint import Checkpoint
from mstar.engine.kvcache import KVPool
from mstar.engine.weights import weight_bytes
from mstar.models import registry
from mstar.models.loading import load_model

FAMILIES = ["orpheus", "qwen3_omni", "bagel", "pi05", "vjepa2", "vjepa2_ac"]


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.counts = True
        self._known = WeakIdKeyDictionary()

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if x.is_meta or not self.counts or storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, Tensor):
                self.add(x)
        return result


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    """Counts what is read of checkpoints, too, and nothing once the KV cache is made."""
    found = Alive()
    read, make = Checkpoint.read, KVPool.__init__

    def counted_read(self: Checkpoint, name: str) -> Tensor:
        x = read(self, name)
        found.add(x)
        return x

    def uncounted(self: KVPool, *args: Any, **kwargs: Any) -> None:
        found.counts = False
        make(self, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "read", counted_read)
    monkeypatch.setattr(KVPool, "__init__", uncounted)
    return found


@pytest.mark.parametrize(
    ("load_format", "dtype"), [("auto", "float32"), ("auto", "bfloat16"), ("dummy", "bfloat16")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_loading_needs_no_more_than_the_weights_and_one_parameter(
    family: str, load_format: str, dtype: str, alive: Alive
) -> None:
    with alive:
        model = load_model(
            registry.find(f"{family}-tiny"),
            device=torch.device("cpu"),
            dtype=dtype,
            load_format=load_format,
            progress=False,
            kv_tokens=64,
        )
    parameters = [p for network in model.networks for p in network.parameters()]
    weights = sum(map(weight_bytes, model.networks))
    largest = max(parameter.numel() for parameter in parameters) * 4  # as it may be stored
    assert weights <= alive.most
    assert alive.most <= weights + largest
