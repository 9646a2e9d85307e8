"""Numbers of requests that come as arrays of some library, as lists or as text."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["array", "as_array", "rows"]

_MOST = float(np.finfo(np.float32).max)


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


def rows(value: Any) -> np.ndarray:
    """An array of numbers that are finite in float32, or an empty one; see `as_array`."""
    try:
        found = as_array(value)
    except (TypeError, ValueError):
        raise ValueError("must be an array of numbers") from None
    if not (np.abs(found) <= _MOST).all():
        raise ValueError("must be finite")
    return found


def array(value: Any) -> np.ndarray:
    """`rows`, and not empty."""
    found = rows(value)
    if not found.size:
        raise ValueError("must be an array of numbers")
    return found
