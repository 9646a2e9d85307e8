from __future__ import annotations

import logging
import threading

import pytest

from mstar.engine.handle import Handle
from mstar.errors import RequestCancelled, RequestFailed, RequestTimeout
from mstar.types import TextChunk, Usage


def fill(handle, *texts, error=None):
    for text in texts:
        handle.event(TextChunk(text))
    if error is None:
        handle.event(TextChunk("", finish_reason="stop", usage=Usage()))
    handle.end(error, Usage())


def test_the_result_is_all_events_folded():
    handle = Handle("r1")
    assert not handle.done
    fill(handle, "a", "b")
    result = handle.result()
    assert handle.done
    assert (result.text, result.finish_reason, result.request_id) == ("ab", "stop", "r1")
    assert len(result.raw) == 3


def test_iterating_gives_events_as_they_come_to_every_thread_that_iterates():
    handle, got = Handle("r"), [[], []]

    def read(into):
        into.extend(event.text for event in handle)

    threads = [threading.Thread(target=read, args=(into,)) for into in got]
    for thread in threads:
        thread.start()
    fill(handle, *map(str, range(200)))
    for thread in threads:
        thread.join(10)
    assert got == [[*map(str, range(200)), ""]] * 2
    assert [event.text for event in handle] == got[0]


def test_waiting_for_the_result_may_time_out_and_the_request_goes_on():
    handle = Handle("r")
    with pytest.raises(TimeoutError, match="request r is still running"):
        handle.result(timeout=0.001)
    fill(handle, "a")
    assert handle.result(timeout=0).text == "a"


def test_an_error_is_raised_by_result_and_after_the_events():
    handle, got = Handle("r"), []
    fill(handle, "a", error=RequestFailed("broken"))
    with pytest.raises(RequestFailed, match="broken"):
        handle.result()
    with pytest.raises(RequestFailed, match="broken"):
        got.extend(event.text for event in handle)
    assert got == ["a"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RequestCancelled("by the caller"), "cancelled"), (RequestTimeout("late"), "timeout")],
)
def test_what_was_made_before_a_stop_is_kept(error, reason):
    handle = Handle("r")
    fill(handle, "a", "b", error=error)
    with pytest.raises(type(error)) as raised:
        handle.result()
    assert (raised.value.partial.text, raised.value.partial.finish_reason) == ("ab", reason)


def test_listeners_hear_of_every_change_and_of_the_end_even_if_it_has_been():
    handle, calls = Handle("r"), []
    handle.listen(lambda: calls.append(handle.taken(0)))
    fill(handle, "a")
    assert [len(events) for events, _ in calls] == [1, 2, 2]
    assert [done for _, done in calls] == [False, False, True]
    handle.listen(lambda: calls.append("late"))
    assert calls[-1] == "late"


def test_a_listener_that_raises_harms_nobody(caplog):
    handle, calls = Handle("r"), []
    handle.listen(lambda: 1 / 0)
    handle.listen(lambda: calls.append(1))
    with caplog.at_level(logging.ERROR, "mstar"):
        fill(handle, "a")
    assert len(calls) == 3
    assert "listener of request r" in caplog.text


def test_cancel_asks_the_engine():
    handle, asked = Handle("r"), []
    handle.cancel()
    handle.cancel_request = lambda: asked.append(True)
    handle.cancel()
    assert asked == [True]
