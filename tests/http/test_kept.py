"""Images and transcripts that are kept for a while."""

from __future__ import annotations

import pytest

from mstar.errors import RequestFailed
from mstar.http.openai.kept import Kept


@pytest.fixture
def clock():
    class Clock:
        now = 1000.0

        def __call__(self) -> float:
            return self.now

    return Clock()


def test_what_is_kept_is_found_by_its_name():
    kept = Kept(100, 10**6)
    for i in range(100):
        kept.put(f"{i}.png", b"%d" % i)
    assert (len(kept), kept.get("42.png")) == (100, b"42")
    assert kept.get("x.png") is None
    assert kept.get("") is None


def test_each_goes_after_its_time(clock):
    kept = Kept(10, 100, clock=clock)
    assert kept.put("first", b"first") == 4600
    clock.now = 2800
    kept.put("second", b"second")
    clock.now = 4599.9
    assert kept.get("first") == b"first"
    clock.now = 4600
    assert kept.get("first") is None
    assert kept.get("second") == b"second"
    assert kept.size == len(b"second")
    clock.now = 1e6
    kept.sweep()
    assert (len(kept), kept.size) == (0, 0)


def test_the_oldest_leave_where_there_is_no_room():
    kept = Kept(3, 10)
    for name in "abcd":
        kept.put(name, "12")
    assert [kept.get(name) for name in "abcd"] == [None, "12", "12", "12"]
    kept.put("e", "1234567")
    assert [kept.get(name) for name in "bcde"] == [None, None, "12", "1234567"]
    assert kept.size == 9


def test_what_never_fits_is_refused():
    kept = Kept(3, 10)
    kept.put("a", b"1")
    with pytest.raises(RequestFailed, match=r"too large.*b64_json"):
        kept.put("b", b"x" * 11)
    assert kept.get("a") == b"1"
