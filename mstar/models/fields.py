"""Reading a published config.json: errors name the field, its value and what is needed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

__all__ = [
    "check_fields",
    "check_flags",
    "check_lists",
    "check_multiple",
    "check_numbers",
    "check_sizes",
    "check_values",
    "known",
    "object_of",
    "read_object",
    "required",
]


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"it must hold an object, not a {type(found).__name__}")
    return found


def known(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config that are fields of a dataclass, lists as tuples where it has such;
    those that are null count as left out."""
    found = {field.name: config[field.name] for field in fields(kind) if field.name in config}
    tuples = {field.name for field in fields(kind) if field.type.startswith("tuple")}
    return {
        name: tuple(value) if name in tuples and isinstance(value, list) else value
        for name, value in found.items()
        if value is not None
    }


def required(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a config that lacks one of `names`."""
    lacking = [name for name in names if config.get(name) is None]
    if lacking:
        raise ValueError(f"it has no {', '.join(lacking)}")


def object_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object in a config, empty if it is left out, or null."""
    found = config.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{name}={found!r}: must be an object")
    return found or {}


def check_values(config: Mapping[str, Any], **values: Any) -> None:
    """Refuse other values; what is left out, or null, may be."""
    for name, value in values.items():
        found = config.get(name)
        if found is not None and found != value:
            raise ValueError(f"{name}={found!r}: must be {value!r}")


def check_multiple(config: Mapping[str, Any], name: str, unit: int, why: str) -> None:
    """Refuse an integer that is no multiple of `unit`."""
    if config[name] % unit:
        raise ValueError(f"{name}={config[name]}: must be a multiple of {unit}, {why}")


def check_sizes(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse anything but integers of at least 1."""
    for name in names:
        if not _is_size(config[name]):
            raise ValueError(f"{name}={config[name]!r}: must be an integer of at least 1")


def check_lists(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse anything but lists of integers of at least 1 that are not empty."""
    for name in names:
        value = list(config[name]) if isinstance(config[name], tuple) else config[name]
        if not isinstance(value, list) or not value or not all(map(_is_size, value)):
            raise ValueError(f"{name}={value!r}: must be a list of integers of at least 1")


def check_numbers(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse anything but finite numbers above 0."""
    for name in names:
        value = config[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}: must be a number above 0")


def check_flags(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse anything but true and false."""
    for name in names:
        if not isinstance(config[name], bool):
            raise ValueError(f"{name}={config[name]!r}: must be true or false")


_CHECKS = {
    "int": check_sizes,
    "float": check_numbers,
    "bool": check_flags,
    "tuple[int, ...]": check_lists,
}


def check_fields(values: Any) -> None:
    """Refuse a dataclass with a field that is not of its type: integers are at least 1, and numbers
    above 0."""
    for field in fields(values):
        if field.type in _CHECKS:
            _CHECKS[field.type](vars(values), [field.name])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
