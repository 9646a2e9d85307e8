"""The names of tensors in checkpoints of pi0.5: one set, whoever saved them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mstar.engine.checkpoint import Checkpoint
from mstar.errors import WeightsError

__all__ = ["EMBEDDING", "GEMMA", "PROJECTOR", "TOWER", "Published", "published_names"]

_MODEL = "paligemma_with_expert.paligemma.model."
TOWER = f"{_MODEL}vision_tower.vision_model."
PROJECTOR = f"{_MODEL}multi_modal_projector.linear."
GEMMA = f"{_MODEL}language_model."
EMBEDDING = f"{GEMMA}embed_tokens.weight"
_TIED = "paligemma_with_expert.paligemma.lm_head.weight"
_SHORT_TOWER = re.compile(re.escape(f"{_MODEL}vision_tower.") + r"(?!vision_model\.)")
_OLD_TIME = re.compile(r"^action_(?=time_mlp_(?:in|out)\.)")
_ADAPTERS = ("base_model.", "lora_")


def published_names(stored: Iterable[str]) -> dict[str, str]:
    """The name that `lerobot/pi05_base` gives a tensor -> the one that it is stored under.

    Undone are: the `model.` before names that lerobot saves after training, a vision tower without
    `vision_model`, and the time MLP's old name. The embedding of tokens is `embed_tokens`; only
    where that is missing it is the output head that it was tied to, since a head saved beside it
    is stale.
    """
    names = {}
    for name in stored:
        plain = _OLD_TIME.sub("", name.removeprefix("model."))
        names[_SHORT_TOWER.sub(TOWER, plain)] = name
    if EMBEDDING not in names and _TIED in names:
        names[EMBEDDING] = names[_TIED]
    return names


class Published:
    """A checkpoint of any of the layouts, under the names of `lerobot/pi05_base`.

    Raises:
        WeightsError: there is none, or it holds an adapter.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        self._checkpoint = Checkpoint.open(file if file.exists() else folder)
        stored = self._checkpoint.names()
        if adapter := next((n for n in stored if any(part in n for part in _ADAPTERS)), None):
            raise WeightsError(
                f"{self} holds an adapter ({adapter}); merge it into its policy and save that"
            )
        self._names = published_names(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __str__(self) -> str:
        return str(self._checkpoint)

    def shape(self, name: str) -> torch.Size:
        """See `Checkpoint.shape`."""
        return self._checkpoint.shape(self._names[name])

    def read(self, name: str) -> Tensor:
        """See `Checkpoint.read`."""
        return self._checkpoint.read(self._names[name])
