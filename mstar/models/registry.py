"""Which models there are, and which files a user's `model` and `weights` arguments mean.

Families inside mstar are import strings here; other packages add theirs with an entry point in the
group `mstar.models` whose name is the model's name and whose object is a `ModelCard`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from os import PathLike
from pathlib import Path
from typing import Any

from mstar.errors import InvalidRequest, ModelNotFound, nearest
from mstar.models.card import ModelCard

__all__ = ["Target", "cards", "find", "get", "identify", "names"]

_BUILTIN = {
    "bagel": "mstar.models.bagel.card:CARD",
    "orpheus": "mstar.models.orpheus.card:CARD",
    "pi05": "mstar.models.pi05.card:CARD",
    "vjepa2": "mstar.models.vjepa2.card:CARD",
    "vjepa2_ac": "mstar.models.vjepa2.card_ac:CARD",
    "qwen3_omni": "mstar.models.qwen3_omni.card:CARD",
}
_GROUP = "mstar.models"
_TINY = "-tiny"
_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")

Weights = str | PathLike | Mapping[str, str | PathLike] | None


@dataclass(frozen=True)
class Target:
    """What a user's arguments mean: a family, and where each part's files come from.

    `sources` maps part -> a local folder (`Path`) or a hub repository id (`str`); `name` is the
    registry name or the repository that was given, or the family's for a folder.
    """

    card: ModelCard
    sources: dict[str, str | Path]
    tiny: bool = False
    name: str = ""


def names() -> list[str]:
    """The names of all models, those of other packages last."""
    return [*_BUILTIN, *_plugins()]


def get(name: str) -> ModelCard:
    """The card of the model called `name`; raises `ModelNotFound`."""
    if name in _BUILTIN:
        module, _, attribute = _BUILTIN[name].partition(":")
        return getattr(import_module(module), attribute)
    plugins = _plugins()
    if name not in plugins:
        raise ModelNotFound(
            f"no model {name!r}{nearest(name, _all_names())}; known: {', '.join(names())}"
        )
    entry = plugins[name]
    try:
        card = entry.load()
    except Exception as error:
        raise ModelNotFound(
            f"the plug-in for {name!r} ({entry.value}) failed to load: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(card, ModelCard) or card.name != name:
        raise ModelNotFound(f"the plug-in {entry.value} is not a ModelCard named {name!r}")
    return card


def cards() -> Iterator[ModelCard]:
    """All cards; a plug-in that does not load is reported as a warning and left out."""
    for name in names():
        try:
            yield get(name)
        except ModelNotFound as error:
            warnings.warn(str(error), stacklevel=2)


def identify(config: dict[str, Any]) -> ModelCard | None:
    """The family that a `config.json` belongs to, or `None`."""
    for card in cards():
        try:
            if card.recognises(config):
                return card
        except Exception as error:
            warnings.warn(f"{card.name} could not look at a config: {error!r}", stacklevel=2)
    return None


def find(model: str | PathLike, weights: Weights = None) -> Target:
    """The family and the files that `model` and `weights` stand for.

    Args:
        model: in this order: a registry name; a name with `-tiny`, the checkpoint inside the
            package; a folder, with a known `config.json` in it or one subfolder per part; a hub
            repository id, `owner/name` or `owner/name@revision`.
        weights: other files for that model: a folder or repository id (of its first part; if the
            folder has subfolders named after the parts, those are used), or part -> such. Parts
            that are not given stay as they were.

    Raises:
        ModelNotFound: no such name, folder or repository, or one of no known family.
        InvalidRequest: `weights` names a part that the model does not have.
    """
    tiny = False
    if isinstance(model, str) and _is_known(model):
        card = get(model)
        sources: dict[str, str | Path] = dict(card.repos)
    elif isinstance(model, str) and _is_known(model.removesuffix(_TINY)):
        card, tiny = get(model.removesuffix(_TINY)), weights is None
        if card.tiny is None:
            raise ModelNotFound(f"{card.name} has no tiny checkpoint; try {card.name!r}")
        sources = card.tiny_sources()
    else:
        card, sources = _from_place(model)
    name = card.name if isinstance(model, PathLike) or Path(model).is_dir() else model
    if weights is not None:
        sources = sources | _parts(card, weights)
    return Target(card, sources, tiny, name)


def _from_place(model: str | PathLike) -> tuple[ModelCard, dict[str, str | Path]]:
    """The family of a folder or a repository, told by its config."""
    place = _place(model)
    if place is None:
        known = ", ".join(_all_names())
        raise ModelNotFound(
            f"no model {str(model)!r}{nearest(str(model), _all_names())}; known names: {known}; "
            "or give a folder, or a hub repository as owner/name"
        )
    if isinstance(place, Path):
        return _from_folder(place)
    for card in cards():
        if place.partition("@")[0] in (card.repos[card.main_part], *card.aliases):
            break
    else:
        from mstar.engine.hub import resolve

        folder = Path(resolve(place, patterns=["config.json"]))
        card = identify(_config(folder / "config.json"))
        if card is None:
            raise ModelNotFound(
                f"the repository {place!r} is of no known family (looked at its config.json); "
                f"known: {', '.join(names())}. If it holds weights of one of these, "
                "give the name as model and the repository as weights"
            )
    return card, {**card.repos, card.main_part: place}


def _from_folder(folder: Path) -> tuple[ModelCard, dict[str, str | Path]]:
    looked = [folder / "config.json"]
    if looked[0].is_file():
        card = identify(_config(looked[0]))
        if card is not None:
            return card, card.repos | _subfolders(card, folder)
    for card in cards():
        config = folder / card.main_part / "config.json"
        looked.append(config)
        if config.is_file() and identify(_config(config)) is card:
            return card, card.repos | _subfolders(card, folder)
    seen = "; ".join(f"{p} ({_summary(p)})" for p in dict.fromkeys(looked))
    raise ModelNotFound(
        f"the folder {folder} is of no known family; looked at {seen}; known: {', '.join(names())}"
    )


def _parts(card: ModelCard, weights: Weights) -> dict[str, str | Path]:
    if not isinstance(weights, Mapping):
        place = _existing("weights", weights)
        return {card.main_part: place} if isinstance(place, str) else _subfolders(card, place)
    for part in weights:
        if part not in card.repos:
            allowed = f"{card.name} has the parts {', '.join(card.repos)}"
            raise InvalidRequest("weights", part, allowed + nearest(str(part), card.repos))
    return {part: _existing(f"weights[{part}]", place) for part, place in weights.items()}


def _subfolders(card: ModelCard, folder: Path) -> dict[str, Path]:
    """The parts inside `folder`: subfolders by name, and the folder itself as the first part."""
    parts = {part: folder / part for part in card.repos if (folder / part).is_dir()}
    if not parts or ((folder / "config.json").is_file() and card.main_part not in parts):
        parts[card.main_part] = folder
    return parts


def _existing(field: str, value: Any) -> str | Path:
    if not isinstance(value, (str, PathLike)):
        raise InvalidRequest(field, value, "must be a folder, a hub repository id, or part -> such")
    place = _place(value)
    if place is None:
        raise ModelNotFound(f"{field}: {value!r} is neither a folder nor a repository (owner/name)")
    return place


def _place(value: str | PathLike) -> str | Path | None:
    """A folder as `Path`, a repository id as `str`; `None` if it looks like neither.

    What looks like a path and is not a folder is an error here.
    """
    if not str(value).strip():
        raise ModelNotFound("the name of a folder or repository is empty")
    path = Path(value).expanduser()
    if path.is_dir():
        return path
    text = str(value)
    if isinstance(value, str) and _REPO_ID.fullmatch(text) and not path.exists():
        return text
    if not isinstance(value, str) or path.exists() or re.match(r"[./~\\]|.*[/\\]", text):
        raise ModelNotFound(f"{text} is not a folder" if path.exists() else f"no folder {text}")
    return None


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"cannot read {path}: {error}") from error
    return config if isinstance(config, dict) else {}


def _summary(path: Path) -> str:
    if not path.is_file():
        return "not there"
    config = _config(path)
    shown = {key: config[key] for key in ("model_type", "vocab_size") if key in config}
    return ", ".join(f"{key}={value!r}" for key, value in shown.items()) or "no model_type"


def _is_known(name: str) -> bool:
    return name in _BUILTIN or name in _plugins()


def _all_names() -> list[str]:
    """The names, and those of the tiny checkpoints where it takes no plug-in to know them."""
    tiny = [name + _TINY for name in _BUILTIN if get(name).tiny is not None]
    return [*_BUILTIN, *tiny, *_plugins()]


def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=_GROUP):
        if entry.name in _BUILTIN:
            warnings.warn(f"{entry.value} cannot replace the model {entry.name!r}", stacklevel=3)
        else:
            found.setdefault(entry.name, entry)
    return found
