"""Checkpoints of V-JEPA 2 in any published layout, under one set of names.

The hub has `encoder.*` and `predictor.*`, a classifier's below `vjepa2.`. The original files hold
dicts of such, `encoder` and `predictor`, whose names carry those of wrappers; a probe's file holds
a list, `classifiers`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mstar.engine.checkpoint import Checkpoint, state_dicts
from mstar.errors import WeightsError

__all__ = ["Published"]

_WRAPPERS = ("module.", "backbone.")
_DICTS = {"encoder": "encoder.", "predictor": "predictor.", "classifiers[0]": ""}
_PICKLES = (".pt", ".pth", ".bin")


class Published:
    """The tensors of a folder or a file as `encoder.*`, `predictor.*`, `pooler.*`, ...

    Raises:
        WeightsError: there are none, or a file is corrupt.
    """

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
        """All names."""
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __str__(self) -> str:
        return f"checkpoint {self.path}"

    def shape(self, name: str) -> torch.Size:
        """See `Checkpoint.shape`."""
        checkpoint, stored = self._tensors[name]
        return checkpoint.shape(stored)

    def read(self, name: str) -> Tensor:
        """See `Checkpoint.read`."""
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
