"""Observations as robot programs hold them: maps, nested or flat, of arrays of any library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mstar.errors import InvalidRequest
from mstar.models.arrays import as_array

__all__ = ["flat", "numbers", "slashed", "split"]


def flat(observation: Mapping[str, Any], rename: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Key -> value, with the keys of nested maps joined by `/`; dots in keys count as such.

    Args:
        rename: key -> the key that is meant.
    """
    renamed = {slashed(old): slashed(new) for old, new in (rename or {}).items()}
    found: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        prefix = renamed.get(prefix, prefix)
        if isinstance(value, Mapping):
            for name, each in value.items():
                name = slashed(str(name))
                visit(f"{prefix}/{name}" if prefix else name, each)
        elif value is not None:
            found[prefix] = value

    visit("", observation)
    return found


def split(
    batch: Mapping[str, Any], keys: Iterable[str], rename: Mapping[str, str] | None = None
) -> list[Mapping[str, Any]]:
    """The observations of a batch: images `[batch, ...]`, and lists and arrays of as many rows;
    what has no rows is every one's. Without such images, or with one of each, it is one.

    Args:
        keys: that matter; what others hold does not.
        rename: see `flat`.

    Raises:
        InvalidRequest: a value has another number of rows.
    """
    found, known = flat(batch, rename), set(map(slashed, keys))
    values = {key: value for key, value in found.items() if key in known}
    count = max((len(x) for x in values.values() if getattr(x, "ndim", 0) == 4), default=1)
    if count == 1:
        return [batch]
    for key, value in values.items():
        if _has_rows(value) and len(value) != count:
            raise InvalidRequest(key, f"{len(value)} rows", f"must be {count}, as of images")

    def one(value: Any, row: int) -> Any:
        if isinstance(value, Mapping):
            return {key: one(each, row) for key, each in value.items()}
        return value[row] if _has_rows(value) and len(value) == count else value

    return [one(batch, row) for row in range(count)]


def _has_rows(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0


def numbers(field: str, value: Any, dtype: type = np.float64) -> np.ndarray:
    """Finite numbers `[dims]`, of an array or a list, with or without dimensions of 1.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        with np.errstate(over="ignore"):  # it is refused below
            found = as_array(value).astype(dtype)
    except (TypeError, ValueError):
        raise InvalidRequest(field, value, "must be numbers") from None
    if found.ndim > 1 and found.size != max(found.shape):
        raise InvalidRequest(field, list(found.shape), "must have one dimension")
    if not np.isfinite(found).all():
        raise InvalidRequest(field, found.tolist(), "must be finite")
    return found.reshape(-1)


def slashed(name: str) -> str:
    """A key as `flat` writes it."""
    return name.replace(".", "/")
