"""Maps with arrays as msgpack, the way openpi's clients write them.

An array is a map of its bytes, dtype and shape, under keys that are bytes themselves; so is a numpy
scalar. Nothing that would have to be executed or trusted is read: no objects, no pickles. A message
may claim anything, so what it claims is checked before room is made for it.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

__all__ = ["packb", "unpackb"]

_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_DATA, _DTYPE, _SHAPE = b"data", b"dtype", b"shape"
_REFUSED = "VOc"  # kinds of dtypes: raw memory and structures, objects, complex numbers
# What `dtype.str` looks like for booleans, integers, floats, bytes, text and times.
_DTYPES = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|[SU]\d{1,7}|[Mm]8(\[\d{0,4}[a-zA-Z]{1,7}\])?)")
_LONGEST = {
    "max_array_len": 4096,
    "max_map_len": 1024,
    "max_str_len": 2**20,
    "max_ext_len": 1024,
}
_MOST_ITEMS = 100_000  # in all maps and lists of a message
_DEEPEST = 16  # maps and lists inside each other
_TOO_DEEP = f"more than {_DEEPEST} maps and lists inside each other"
_MOST_DIMENSIONS = 16


def packb(value: Any) -> bytes:
    """`value` as a message.

    Raises:
        TypeError: it holds something that has no form on the wire.
    """
    return msgpack.packb(value, default=_packed)


def unpackb(message: bytes) -> Any:
    """What a message holds. Arrays are views of it that cannot be written to.

    Raises:
        ValueError: it is no such message, or holds what is not taken.
    """
    reader = _Reader()
    try:
        found = msgpack.unpackb(
            message,
            object_hook=reader.map,
            list_hook=reader.list,
            ext_hook=_extension,
            raw=False,
            **_LONGEST,
        )
    except msgpack.ExtraData:
        raise ValueError("not msgpack: something follows the first value") from None
    except msgpack.StackError:
        raise ValueError(_TOO_DEEP) from None
    except (ValueError, msgpack.UnpackException, OverflowError) as error:
        raise ValueError(f"not msgpack that is taken here: {error}") from None
    _check_depth(found, _DEEPEST)
    return found


def _packed(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"a {type(value).__name__} has no form on the wire")
    if value.dtype.kind in _REFUSED:
        raise TypeError(f"arrays of dtype {value.dtype} are not sent")
    dtype = value.dtype.str
    if isinstance(value, np.ndarray):
        return {_ARRAY: True, _DATA: value.tobytes(), _DTYPE: dtype, _SHAPE: value.shape}
    return {_SCALAR: True, _DATA: value.item(), _DTYPE: dtype}


class _Reader:
    """Counts what a message holds, and turns the maps that stand for arrays into arrays."""

    def __init__(self) -> None:
        self._left = _MOST_ITEMS

    def map(self, found: dict[Any, Any]) -> Any:
        self._count(found)
        if _ARRAY in found:
            return _array(found)
        return _scalar(found) if _SCALAR in found else found

    def list(self, found: list[Any]) -> list[Any]:
        self._count(found)
        return found

    def _count(self, found: Any) -> None:
        self._left -= 1 + len(found)
        if self._left < 0:
            raise ValueError(f"more than {_MOST_ITEMS} values")


def _array(found: dict[Any, Any]) -> np.ndarray:
    dtype, data, shape = _dtype(found), found.get(_DATA), found.get(_SHAPE)
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array's shape is {shape!r:.80}")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"an array has {len(shape)} dimensions")
    size = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != size:
        given = f"{len(data)} bytes" if isinstance(data, bytes) else f"a {type(data).__name__}"
        raise ValueError(f"an array {shape} of {dtype.str} has {given} of data")
    array = np.ndarray(shape, dtype, data)
    if dtype.kind == "U":
        codes = np.frombuffer(data, f"{dtype.str[0]}u4")
        if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any():
            raise ValueError("an array of text holds codes that are no characters")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _scalar(found: dict[Any, Any]) -> np.generic:
    dtype, data = _dtype(found), found.get(_DATA)
    if not isinstance(data, (bool, int, float, str, bytes)):
        raise ValueError(f"a scalar's value is a {type(data).__name__}")
    try:
        scalar = dtype.newbyteorder("=").type(data)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a scalar of {dtype.str}: {error}") from None
    if dtype.kind in "iu" and scalar != data:  # NumPy 1 wraps around
        raise ValueError(f"a scalar of {dtype.str} cannot be {data!r:.80}")
    return scalar


def _dtype(found: dict[Any, Any]) -> np.dtype:
    text = found.get(_DTYPE)
    if not isinstance(text, str) or not _DTYPES.fullmatch(text):
        raise ValueError(f"arrays of dtype {text!r:.80} are not taken")
    try:
        return np.dtype(text)
    except TypeError as error:
        raise ValueError(f"dtype {text!r}: {error}") from None


def _extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _check_depth(value: Any, left: int) -> None:
    if not isinstance(value, (dict, list)):
        return
    if not left:
        raise ValueError(_TOO_DEEP)
    for each in value.values() if isinstance(value, dict) else value:
        _check_depth(each, left - 1)
