"""Observations as robot programs hold them: maps, nested or flat, of arrays of any library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mstar.errors import InvalidRequest
from mstar.models.parameters import plain

__all__ = ["as_array", "flat", "numbers", "positive", "slashed"]


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


def as_array(value: Any) -> np.ndarray:
    """Numbers as an array of numpy, in this machine's byte order; of arrays of any library, lists,
    or text such as `1, 2, 3`.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str):
        value = [float(number) for number in value.split(",")]
    if hasattr(value, "detach"):
        try:
            value = value.detach().cpu()
            if value.is_floating_point() and value.element_size() < 4:
                value = value.float()  # numpy has no bfloat16
            value = value.numpy()
        except (RuntimeError, TypeError) as error:  # sparse, say
            raise ValueError(f"must be an array of numbers: {error}") from None
    found = np.asarray(value)
    if found.dtype.kind not in "fiub":
        raise ValueError("must be an array of numbers")
    return found.astype(found.dtype.newbyteorder("="), copy=False)


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


def positive(field: str, value: Any, most: float) -> float:
    """A number above 0, of Python or numpy.

    Raises:
        InvalidRequest: it is none.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= most:
        raise InvalidRequest(field, value, f"must be above 0, at most {most:g}")
    return float(number)


def slashed(name: str) -> str:
    """A key as `flat` writes it."""
    return name.replace(".", "/")
