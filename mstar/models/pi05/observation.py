"""Observations as robot programs hold them: maps, nested or flat, of arrays of any library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mstar.errors import InvalidRequest
from mstar.models.arrays import as_array

__all__ = ["flat", "numbers", "slashed"]


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
