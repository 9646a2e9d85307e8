"""Images that are kept for a while."""

from __future__ import annotations

import pytest

from mstar.errors import RequestFailed
from mstar.http.openai.image_store import ImageStore


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    return Clock()


def test_files_are_found_under_names_of_their_own(clock):
    store = ImageStore(clock=clock)
    names = [store.add(b"%d" % i, "png") for i in range(100)]
    assert len(set(names)) == len(store) == 100
    assert all(name.endswith(".png") and len(name) > 30 for name in names)
    assert store.get(names[42]) == b"42"
    assert store.get("x.png") is None
    assert store.get("") is None


def test_files_go_after_their_time(clock):
    store = ImageStore(clock=clock)
    first = store.add(b"first", "png")
    clock.now = 1800
    second = store.add(b"second", "png")
    clock.now = 3599.9
    assert store.get(first) == b"first"
    clock.now = 3600
    assert store.get(first) is None
    assert store.get(second) == b"second"
    assert store.bytes == len(b"second")
    clock.now = 1e6
    store.sweep()
    assert (len(store), store.bytes) == (0, 0)


def test_the_oldest_leave_where_there_is_no_room(clock):
    store = ImageStore(max_files=3, max_bytes=10, clock=clock)
    names = [store.add(b"12", "png") for _ in range(4)]
    assert [store.get(name) for name in names] == [None, b"12", b"12", b"12"]
    last = store.add(b"1234567", "webp")
    assert [store.get(name) for name in names[1:]] == [None, None, b"12"]
    assert store.get(last) == b"1234567"
    assert store.bytes == 9


def test_what_never_fits_is_refused(clock):
    store = ImageStore(max_bytes=10, clock=clock)
    name = store.add(b"1", "png")
    with pytest.raises(RequestFailed, match="b64_json"):
        store.add(b"x" * 11, "png")
    assert store.get(name) == b"1"
