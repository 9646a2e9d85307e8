"""What lies beside the weights: lerobot's processor files, openpi's norm_stats.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from mstar.errors import WeightsError
from mstar.models.fields import check_flags, check_numbers, check_sizes, read_object
from mstar.models.pi05.config import ACTION, STATE, mode_of, names_of

__all__ = ["Processors", "Statistics", "read_processors", "read_statistics"]

Table = Mapping[str, np.ndarray]
_NAMES = {STATE: "state", "state": "state", ACTION: "action", "actions": "action"}


@dataclass(frozen=True)
class Statistics:
    """Of the state and of the actions: name (`q01`, `mean`, ...) -> values `[dims]`.

    Args:
        source: where they are from, for people.
    """

    state: Table | None = None
    action: Table | None = None
    source: str = "none"


@dataclass(frozen=True)
class Processors:
    """What policy_preprocessor.json and policy_postprocessor.json say.

    Args:
        rename: keys of observations -> the names that the policy knows.
        modes: kind of feature -> mode of normalisation, as far as something is said.
        tokenizer: folder or hub name of the tokenizer.
        max_length: of the prompt in tokens.
        relative: whether actions are relative; None if nothing is said.

    Raises:
        ValueError: something is not what it should be.
    """

    statistics: Statistics = field(default_factory=Statistics)
    rename: Mapping[str, str] = field(default_factory=dict)
    modes: Mapping[str, str] = field(default_factory=dict)
    eps: float = 1e-8
    tokenizer: str | None = None
    max_length: int | None = None
    relative: bool | None = None
    exclude: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_numbers(vars(self), ("eps",))
        check_sizes(vars(self), ["max_length"] if self.max_length is not None else [])
        check_flags(vars(self), ["relative"] if self.relative is not None else [])
        if not isinstance(self.tokenizer, str | None):
            raise ValueError(f"tokenizer_name={self.tokenizer!r}: must be a name")
        names = [*self.rename, *self.rename.values(), *self.modes]
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise ValueError(f"{wrong[0]!r}: must be a name")


def read_processors(folder: Path) -> Processors:
    """Read a checkpoint's processor files, as far as there are any.

    Raises:
        WeightsError: one is broken, or names a file that is not there.
    """
    try:
        return _processors(folder)
    except (AttributeError, TypeError, ValueError) as error:
        raise WeightsError(f"cannot use the processor files in {folder}: {error}") from error


def _processors(folder: Path) -> Processors:
    before = _steps(folder, "policy_preprocessor.json")
    after = _steps(folder, "policy_postprocessor.json")
    state = _table(folder, before.get("normalizer_processor"), STATE)
    action = _table(folder, after.get("unnormalizer_processor"), ACTION)
    config = _config(before, "normalizer_processor")
    tokenize = _config(before, "tokenizer_processor")
    artifacts = before.get("tokenizer_processor", {}).get("artifacts") or {}
    relative = _config(before, "relative_actions_processor")
    absolute = _config(after, "absolute_actions_processor")
    found = state is not None or action is not None
    return Processors(
        statistics=Statistics(state, action, "processor files" if found else "none"),
        rename=_config(before, "rename_observations_processor").get("rename_map") or {},
        modes={kind: mode_of(mode) for kind, mode in (config.get("norm_map") or {}).items()},
        eps=config.get("eps", 1e-8),
        tokenizer=artifacts.get("tokenizer_name", tokenize.get("tokenizer_name")),
        max_length=tokenize.get("max_length"),
        relative=absolute.get("enabled", relative.get("enabled")),
        exclude=_names(relative, "exclude_joints"),
        names=_names(relative, "action_names"),
    )


def read_statistics(given: Any) -> Statistics:
    """Statistics that a user gives.

    Args:
        given: a norm_stats.json of openpi, a state file of lerobot, a folder with either, or what
            such files hold: `{"observation.state" or "state": {"q01": [...], ...}, "action" or
            "actions": {...}}`.

    Raises:
        WeightsError: they cannot be read.
    """
    if isinstance(given, Statistics):
        return given
    if isinstance(given, Mapping):
        return _statistics(given, "an argument")
    if not isinstance(given, (str, PathLike)):
        raise WeightsError(f"statistics={given!r}: must be a file, a folder, or what they hold")
    path = Path(given)
    if path.is_dir():
        return _in_folder(path)
    try:
        content = _flat(path) if path.suffix == ".safetensors" else read_object(path)
    except Exception as error:  # the file is a stranger's
        raise WeightsError(f"cannot read statistics from {path}: {error}") from error
    return _statistics(content, str(path))


def _in_folder(folder: Path) -> Statistics:
    if (folder / "policy_preprocessor.json").exists():
        return read_processors(folder).statistics
    files = sorted(folder.glob("**/norm_stats.json"))
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        raise WeightsError(f"several statistics in {folder} ({names}): name one of them")
    return read_statistics(files[0]) if files else Statistics()


def _statistics(content: Mapping[str, Any], source: str) -> Statistics:
    content = content.get("norm_stats", content)
    tables: dict[str, Table] = {}
    for name, table in content.items() if isinstance(content, Mapping) else ():
        if name in _NAMES and isinstance(table, Mapping):
            tables[_NAMES[name]] = {k: _values(name, k, v) for k, v in table.items()}
    if not tables:
        known = ", ".join(_NAMES)
        raise WeightsError(f"no statistics in {source}: expected an object with {known}")
    return Statistics(**tables, source=source)


def _values(feature: str, name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray([] if value is None else value, np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"statistics: {feature}.{name} must be a list of numbers") from error


def _steps(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """The steps of a pipeline by their registry names."""
    file = folder / name
    if not file.exists():
        return {}
    try:
        steps = read_object(file).get("steps", [])
        return {step["registry_name"]: step for step in steps if "registry_name" in step}
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise WeightsError(f"cannot use {file}: {error}") from error


def _table(folder: Path, step: Mapping[str, Any] | None, feature: str) -> Table | None:
    """A feature's in the state file of a step."""
    name = (step or {}).get("state_file")
    if name is None:
        return None
    file = folder / name
    if file.parent != folder or not file.is_file():
        raise WeightsError(f"there is no {file}, which a processor file names")
    try:
        return _flat(file).get(feature)
    except Exception as error:  # the file is a stranger's
        raise WeightsError(f"cannot read {file}: {error}") from error


def _flat(file: Path) -> dict[str, dict[str, np.ndarray]]:
    """feature -> statistic -> values, of tensors called `feature.statistic`."""
    from safetensors.torch import load_file

    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in load_file(file).items():
        feature, _, statistic = name.rpartition(".")
        found.setdefault(feature, {})[statistic] = tensor.float().numpy().reshape(-1)
    return found


def _config(steps: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return steps.get(name, {}).get("config") or {}


def _names(config: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    return None if config.get(name) is None else names_of(name, config[name])
