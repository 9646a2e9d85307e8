"""The card of a model: what can be known about a family without loading it (no torch needed)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mstar.models.parameters import Parameters

__all__ = ["ModelCard"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelCard:
    """What the registry, the command line and HTTP need to know about a family.

    Args:
        name: the registry name (`"orpheus"`).
        title: one line for people.
        entry: import string of the `Model` class (`"package.module:Class"`).
        inputs, outputs: modalities that it takes and makes.
        parameters: what users can set.
        repos: part of the model -> hub repository; the first part is the one that names the model.
        aliases: other hub repositories that hold the first part of this family.
        tiny: a folder with the tiny checkpoint, one subfolder per part; `None` if there is none.
        full: a folder with the configs and tokenizers of the published size, one subfolder per
            part, for dummy weights; `None` if there is none.
        chat: whether it takes `messages`.
        recognises: whether a first part's `config.json` belongs to this family; by default, whether
            its `model_type` is the name.
        default_output: what it makes when nobody says; the first of `outputs` if left out.
        methods: of `encode`, `predict`, `rollout` and `plan` of the Engine, those that it has.
    """

    name: str
    title: str
    entry: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: Parameters
    repos: Mapping[str, str]
    aliases: tuple[str, ...] = ()
    tiny: Path | None = None
    full: Path | None = None
    chat: bool = False
    recognises: Callable[[dict[str, Any]], bool] | None = None
    default_output: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.default_output:
            object.__setattr__(self, "default_output", self.outputs[:1])
        if self.recognises is None:
            found = self.name
            object.__setattr__(self, "recognises", lambda c: c.get("model_type") == found)

    @property
    def main_part(self) -> str:
        """The part whose repository or folder stands for the whole model."""
        return next(iter(self.repos))

    def tiny_sources(self) -> dict[str, str | Path]:
        """Part -> folder of the tiny checkpoint that ships with the package."""
        if self.tiny is None:
            raise LookupError(f"{self.name} has no tiny checkpoint")
        return {part: self.tiny / part for part in self.repos}

    def load_class(self) -> type:
        """Import and return the `Model` class; this is where torch comes in."""
        module, _, attribute = self.entry.partition(":")
        return getattr(import_module(module), attribute)
