"""Observations as robot programs hold them: maps, nested or flat, of arrays of any library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mstar.errors import InvalidRequest

__all__ = ["flat", "numbers"]


def flat(observation: Mapping[str, Any], rename: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Key -> value, with the keys of nested maps joined by `/`; dots in keys count as such.

    Args:
        rename: key -> the key that is meant.
    """
    renamed = {_key(old): _key(new) for old, new in (rename or {}).items()}
    found: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        prefix = renamed.get(prefix, prefix)
        if isinstance(value, Mapping):
            for name, each in value.items():
                visit(f"{prefix}/{_key(str(name))}" if prefix else _key(str(name)), each)
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
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.double().numpy() if value.is_floating_point() else value.numpy()
        found = np.asarray(value)
        if found.dtype.kind not in "fiub":
            raise ValueError
        found = found.astype(dtype)
    except (TypeError, ValueError):
        raise InvalidRequest(field, value, "must be numbers") from None
    if found.ndim > 1 and found.size != max(found.shape):
        raise InvalidRequest(field, list(found.shape), "must have one dimension")
    if not np.isfinite(found).all():
        raise InvalidRequest(field, found.tolist(), "must be finite")
    return found.reshape(-1)


def _key(name: str) -> str:
    return name.replace(".", "/")
