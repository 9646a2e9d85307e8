from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstar.models.orpheus.windows import Window, WindowPlan


def plan(context, lookahead, chunk, frames):
    """The windows of an utterance, each with the number of frames that were there."""
    windows = WindowPlan(context, lookahead, chunk)
    made = [(there, w) for there in range(1, frames + 1) for w in windows.ready(there)]
    return made + [(frames, w) for w in windows.ready(frames, ended=True)]


sizes = st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(1, 5), st.integers(0, 20))


@given(sizes)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_frame_is_heard_once_in_order(size):
    _, _, _, frames = size
    heard = [frame for _, w in plan(*size) for frame in range(w.start, w.end)]
    assert heard == list(range(frames))


@given(sizes)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_windows_lie_within_what_is_there_and_within_the_context(size):
    context, _, chunk, _ = size
    for there, w in plan(*size):
        assert 0 <= w.low <= w.start < w.end <= w.high <= there
        assert w.end - w.start <= chunk
        assert w.low == max(0, w.start - context)


@given(sizes)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_with_full_look_ahead_every_frame_has_its_whole_context(size):
    context, _, chunk, frames = size
    for _, w in plan(context, context, chunk, frames):
        assert w.high >= min(w.end + context, frames)


@pytest.mark.parametrize("lookahead", [0, 1, 2, 3])
def test_the_first_frame_is_heard_as_early_as_the_look_ahead_allows(lookahead):
    made = plan(3, lookahead, 1, 12)
    assert made[0] == (1 + lookahead, Window(0, 1 + lookahead, 0, 1))
    ahead = [w.high - w.end for _, w in made[: 12 - 3]]
    assert ahead == [min(lookahead + frame, 3) for frame in range(9)]


def test_nothing_is_planned_twice_and_nothing_of_nothing():
    windows = WindowPlan(3, 3, 1)
    assert list(windows.ready(4)) == [Window(0, 4, 0, 1)]
    assert list(windows.ready(4)) == []
    assert list(WindowPlan(3, 3, 4).ready(0, ended=True)) == []


def test_the_end_is_heard_in_chunks():
    windows = WindowPlan(2, 2, 4)
    assert list(windows.ready(5)) == []
    assert list(windows.ready(6)) == [Window(0, 6, 0, 4)]
    assert list(windows.ready(9, ended=True)) == [Window(2, 9, 4, 8), Window(6, 9, 8, 9)]
