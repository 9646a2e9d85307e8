"""Frames of openpi's protocol: the published bytes, both ways, and nothing that could do harm."""

from __future__ import annotations

import pickle
import tracemalloc

import msgpack
import numpy as np
import pytest

from mstar.http.msgpack_numpy import packb, unpackb
from tests.http.policies import FACTS

PROTOCOL = FACTS["protocol"]
SAMPLE = {
    "observation/state": np.array([0.5, -1.0]),
    "img": np.arange(6, dtype=np.uint8).reshape(1, 2, 3),
    "prompt": "go",
    "g": np.float32(0.25),
    "n": 3,
    "flag": True,
    "none": None,
}


def array(data: object = bytes(4), dtype: object = "<f4", shape: object = (1,), **more) -> bytes:
    """A message with one array that claims to be whatever is asked for."""
    found = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
    return msgpack.packb({"a": found, **more})


def scalar(data: object, dtype: object) -> bytes:
    return msgpack.packb({"a": {b"__npgeneric__": True, b"data": data, b"dtype": dtype}})


BAD = {
    "empty": b"",
    "truncated": packb(SAMPLE)[:-3],
    "cut after the first byte": b"\x87",
    "two values": packb({}) + packb({}),
    "a pickle": pickle.dumps({"state": [0.0]}),
    "a huge list": b"\xdd\xff\xff\xff\xff",
    "a huge map": b"\xdf\xff\xff\xff\xff",
    "huge bytes": b"\xc6\xff\xff\xff\xff",
    "a huge text": b"\xdb\xff\xff\xff\xff",
    "lists in lists, each of them large": b"\xdc\x0f\xff" * 1000 + b"\xc0" * 4095,
    "as many values as bytes": b"\xdc\x0f\xff" + (b"\xdc\x0f\xff" + b"\xc0" * 4095) * 99,
    "lists 10,000 deep": b"\x91" * 10_000 + b"\xc0",
    "maps 10,000 deep": b"\x81\xa1a" * 10_000 + b"\xc0",
    "lists 20 deep": b"\x91" * 20 + b"\xc0",
    "no UTF-8": b"\x81\xa1\xff\xc0",
    "a number as key": b"\x81\x01\x02",
    "a code that there is not": b"\xc1",
    "an extension": msgpack.packb(msgpack.ExtType(5, pickle.dumps(1))),
    "objects": array(pickle.dumps([1]), "|O"),
    "objects, in native order": array(pickle.dumps([1]), "O"),
    "memory": array(bytes(4), "|V4"),
    "complex": array(bytes(8), "<c8"),
    "a structure": array(bytes(8), "i4,i4"),
    "several in one": array(bytes(8), "(2,)f4"),
    "a huge dtype": array(bytes(4), "<U99999999999"),
    "no dtype": array(dtype=None),
    "a dtype of bytes": array(dtype=b"<f4"),
    "a dtype that there is not": array(dtype="<f3"),
    "long doubles": array(bytes(16), "<f16"),
    "a negative shape": array(shape=(-1,)),
    "negative twice": array(shape=(-1, -1)),
    "a shape of floats": array(shape=(1.0,)),
    "a shape of flags": array(shape=(True,)),
    "a shape that is a number": array(shape=1),
    "no shape": array(shape=None),
    "a huge shape": array(shape=(2**62, 2**62)),
    "0 of a huge shape, and data": array(shape=(2**62, 0)),
    "0 of a shape beyond all numbers": array(b"", shape=(2**64 - 1, 0)),
    "too many dimensions": array(shape=(1,) * 65),
    "too little data": array(bytes(3)),
    "too much data": array(bytes(5)),
    "data as text": array("abcd"),
    "data as a list": array([0, 0, 0, 0]),
    "text that is none": array(b"\xff\xff\xff\xff", "<U1"),
    "half a character": array(b"\x00\xd8\x00\x00", "<U1"),
    "nothing but the mark": msgpack.packb({"a": {b"__ndarray__": True}}),
    "a scalar that is a list": scalar([1], "<f4"),
    "a scalar of text": scalar("x", "<f4"),
    "a scalar that is too large": scalar(300, "|u1"),
    "a scalar that is an object": scalar(pickle.dumps(1), "|O"),
    "a scalar without a dtype": scalar(1, None),
}


def same(left: object, right: object) -> bool:
    return type(left) is type(right) and bool(np.all(np.asarray(left == right)))


def test_frames_are_those_published():
    assert packb(PROTOCOL["metadata"]).hex() == PROTOCOL["metadata_frame_hex"]
    assert packb(SAMPLE).hex() == PROTOCOL["sample_obs_frame_hex"]


def test_published_frames_are_read():
    assert unpackb(bytes.fromhex(PROTOCOL["metadata_frame_hex"])) == PROTOCOL["metadata"]
    found = unpackb(bytes.fromhex(PROTOCOL["sample_obs_frame_hex"]))
    assert list(found) == list(SAMPLE)
    for name, value in SAMPLE.items():
        assert same(found[name], value), name
        assert getattr(found[name], "dtype", None) == getattr(value, "dtype", None), name


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((0, 3), np.float32),
        np.array(1.5),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(6, dtype=np.int64)[::-2],
        np.array([True, False]),
        np.array(["go", "on"]),
        np.array([b"go"]),
        np.float16(0.5),
        np.bool_(True),
    ],
    ids=repr,
)
def test_what_is_sent_arrives(value):
    found = unpackb(packb({"a": value}))["a"]
    assert found.dtype == value.dtype
    assert np.array_equal(found, value)


def test_arrays_are_views_in_the_order_of_this_machine():
    found = unpackb(packb({"a": np.arange(4, dtype="<f8"), "b": np.arange(4, dtype=">f8")}))
    assert not found["a"].flags.writeable
    assert found["b"].dtype.isnative
    assert np.array_equal(found["b"], np.arange(4))
    assert unpackb(packb((1, [2]))) == [1, [2]]


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.zeros(2, "c8"), np.zeros(2, "i4,i4"), object(), {1, 2}]
)
def test_what_has_no_form_is_not_sent(value):
    with pytest.raises(TypeError):
        packb({"a": value})


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_taken(name):
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"\w"):
        unpackb(BAD[name])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * 2**20
