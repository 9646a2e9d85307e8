"""Checkpoints of V-JEPA 2 in any published layout, under one set of names.

The hub has `encoder.*` and `predictor.*`, a classifier's below `vjepa2.`. The original files hold
dicts of such, `encoder` and `predictor`, whose names carry those of wrappers; a probe's file holds
a list, `classifiers`. Our modules are called as in the original layout, with its wrappers' names
left out. There queries, keys and values are one matrix; the hub has them apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mstar.engine.checkpoint import Checkpoint, state_dicts
from mstar.engine.weights import Source
from mstar.errors import WeightsError

__all__ = ["BLOCK", "POOLER_BLOCK", "Published", "sources"]

_WRAPPERS = ("module.", "backbone.")
_DICTS = {"encoder": "encoder.", "predictor": "predictor.", "classifiers[0]": ""}
_PICKLES = (".pt", ".pth", ".bin")


class Published:
    """The tensors of a folder or a file as `encoder.*`, `predictor.*`, `pooler.*`, ... Raises
    WeightsError if there are none, or a file is corrupt."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tensors: dict[str, tuple[Checkpoint, str]] = {}
        for prefix, checkpoint in _checkpoints(self.path):
            for stored in checkpoint.names():
                name = stored
                for wrapper in _WRAPPERS:
                    name = name.replace(wrapper, "")
                name = prefix + name.removeprefix("vjepa2.")
                other, _ = self._tensors.setdefault(name, (checkpoint, stored))
                if other is not checkpoint:
                    places = f"{other.path.name} and {checkpoint.path.name}"
                    raise WeightsError(f"{self}: {name} is in {places}; leave one of them there")

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __str__(self) -> str:
        return f"checkpoint {self.path}"

    def shape(self, name: str) -> torch.Size:
        checkpoint, stored = self._tensors[name]
        return checkpoint.shape(stored)

    def read(self, name: str) -> Tensor:
        checkpoint, stored = self._tensors[name]
        return checkpoint.read(stored)


def _checkpoints(path: Path) -> list[tuple[str, Checkpoint]]:
    """The flat dicts of tensors, and what goes before their names."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if path.is_dir() and any(file.suffix == ".safetensors" for file in files):
        return [("", Checkpoint.open(path))]
    found = []
    for file in (file for file in files if file.suffix in _PICKLES):
        dicts = state_dicts(file)
        keys = [key for key in _DICTS if key in dicts]
        found += [(_DICTS[key], Checkpoint.open(file, key)) for key in keys]
    return found or [("", Checkpoint.open(path))]


Names = Mapping[str, str | Sequence[str]]

# Module of a block -> its name in the hub's layout, or those of its parts.
BLOCK: Names = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": tuple(f"attention.{part}" for part in ("query", "key", "value")),
    "attn.proj": "attention.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
POOLER_BLOCK: Names = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"),
    "attn.proj": "self_attn.out_proj",
    "xattn.q": "cross_attn.q_proj",
    "xattn.kv": ("cross_attn.k_proj", "cross_attn.v_proj"),
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PATH = re.compile(r"(?P<block>\w*blocks\.\d+\.|cross_attention_block\.)?(?P<module>.*?)\.?(\w+)")


def sources(name: str, original: str, outside: Names, blocks: str, inside: Names) -> list[Source]:
    """Where parameter `name` of a network is: in the hub's layout, else in the original one.

    Args:
        original: prefix of the network's names in the original layout.
        outside: module outside the blocks -> its name in the hub's layout.
        blocks: what the hub calls the list of blocks.
        inside: module inside a block -> its name there.
    """
    block, module, parameter = _PATH.fullmatch(name).groups()
    if block is None:
        prefix, found = "", outside[module]
    elif block == "cross_attention_block.":
        prefix, found = "pooler.cross_attention_layer.", inside[module]
    else:
        prefix, found = f"{blocks}.{block.split('.')[1]}.", inside[module]
    parts = (found,) if isinstance(found, str) else found
    hub = Source(tuple(f"{prefix}{part}.{parameter}" for part in parts))
    return [hub, Source((f"{original}{name}",))]
