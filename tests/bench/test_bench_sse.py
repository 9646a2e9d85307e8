"""Server-sent events, however the body is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstar.bench.sse import SseEvent, SseParser

BODY = (
    b"\xef\xbb\xbf: hello\r\n\r\n"
    b"data: one\r\n\r\n"
    b"event: named\rdata:two\rdata:  three\r\r"
    b"id: 7\nretry: 10\nunknown\ndata\n\n"
    b": ping\n\n"
    b"event: lonely\n\n"
    b'data: {"a": "gr\xc3\xbc\xc3\x9fe"}\n\n'
    b"data: last"
)
EVENTS = [
    SseEvent("message", "one"),
    SseEvent("named", "two\n three"),
    SseEvent("message", ""),
    SseEvent("message", '{"a": "grüße"}'),
    SseEvent("message", "last"),
]


def parse(pieces):
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def test_a_body_in_one_piece():
    assert parse([BODY]) == EVENTS


def test_byte_by_byte():
    assert parse(bytes([byte]) for byte in BODY) == EVENTS


@given(st.lists(st.integers(0, len(BODY)), max_size=12))
def test_cut_anywhere(cuts):
    places = [0, *sorted(cuts), len(BODY)]
    assert parse(BODY[a:b] for a, b in pairwise(places)) == EVENTS


def test_an_event_is_told_as_soon_as_its_blank_line_is_there():
    parser = SseParser()
    assert parser.feed(b"data: x\r\n\r") == [SseEvent("message", "x")]
    assert parser.feed(b"\ndata: y\n") == []
    assert parser.feed(b"\n") == [SseEvent("message", "y")]


@pytest.mark.parametrize("body", [b"", b"\n\n\n", b": only\n\n: comments", b"event: x"])
def test_nothing_is_no_event(body):
    assert parse([body]) == []
