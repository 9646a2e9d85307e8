"""From the bytes of a reply to events, wherever the bytes were cut."""

import base64
import json
import pickle

import numpy as np
import pytest

from mstar.errors import (
    EngineClosed,
    EngineOverloaded,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    RequestCancelled,
    RequestFailed,
    RequestTimeout,
)
from mstar.transport import Refused, error_of, refusal
from mstar.types import (
    ActionChunk,
    Event,
    ImageChunk,
    LatentChunk,
    TextChunk,
    Usage,
)
from mstar.wire import PROMISE, RawChunk, Reply

URL = "http://host/generate"


def entry(data: bytes, **metadata) -> dict:
    return {"data": base64.b64encode(data).decode(), "metadata": metadata}


def line(modality: str, data: bytes = b"", **metadata) -> bytes:
    return json.dumps({"modality": modality, **entry(data, **metadata)}).encode() + b"\n"


def events_of(*lines: bytes, cut: int = 10**9, headers=None) -> list[Event]:
    reply = Reply(URL, stream=True)
    reply.begin(headers or {})
    body, events = b"".join(lines), []
    for start in range(0, len(body), cut):
        events += reply.feed(body[start : start + cut])
    return [*events, *reply.finish()]


def one(*args, **metadata) -> Event:
    (event,) = events_of(line(*args, **metadata))
    return event


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 10**9])
def test_pieces_may_end_anywhere(cut):
    text = "añ🙂"
    events = events_of(*(line("text", bytes([byte])) for byte in text.encode()), cut=cut)
    assert [event.text for event in events] == list(text)


def test_a_character_that_never_ends_is_replaced_at_the_end():
    whole, tail = events_of(line("text", "aé".encode()[:2]))
    assert (whole.text, tail.text) == ("a", "\ufffd")
    (last,) = events_of(line("text", b"\xc3", finish_reason="stop"))
    assert (last.text, last.finish_reason) == ("\ufffd", "stop")


def test_bytes_of_other_kinds_may_come_between_halves_of_a_character():
    first, second, image = "é".encode()[:1], "é".encode()[1:], b"\x89PNG"
    events = events_of(line("text", first), line("image", image), line("text", second))
    assert [type(event) for event in events] == [ImageChunk, TextChunk]
    assert events[1].text == "é"


def test_the_last_line_needs_no_newline_and_blank_lines_do_not_count():
    assert len(events_of(b"\r\n\n", line("text", b"a"), line("text", b"b").rstrip())) == 2


def test_the_last_event_carries_the_end_and_the_usage():
    usage = {"generated_tokens": 5, "total_time": 0.5, "of_another_server": 1}
    last = one("text", finish_reason="length", usage=usage, request_id="r")
    assert (last.text, last.finish_reason) == ("", "length")
    assert last.usage == Usage(generated_tokens=5, total_time=0.5)
    sound = one("audio", finish_reason="stop", sample_rate=16000)
    assert (len(sound.pcm), sound.sample_rate, sound.finish_reason) == (0, 16000, "stop")
    assert type(one("", finish_reason="stop")) is Event


def test_audio_without_metadata_is_24_khz_mono():
    chunk = one("audio", np.array([1, -2], "<i2").tobytes())
    assert chunk.sample_rate == 24000
    assert chunk.pcm.dtype == np.int16
    assert chunk.pcm.tolist() == [1, -2]


def test_samples_may_be_cut_in_half_and_stereo_is_mixed():
    data = np.array([1, 2, 3], "<i2").tobytes()
    first, second = events_of(line("audio", data[:3]), line("audio", data[3:]))
    assert [*first.pcm, *second.pcm] == [1, 2, 3]
    stereo = np.array([100, 200, -4, -2], "<i2").tobytes()
    assert one("audio", stereo, num_channels=2, sample_rate=48000).pcm.tolist() == [150, -3]


@pytest.mark.parametrize(
    ("modality", "kind", "field"),
    [
        ("action", ActionChunk, "actions"),
        ("latent", LatentChunk, "latents"),
        ("video", LatentChunk, "latents"),
    ],
)
def test_arrays_have_the_shape_that_is_told_and_are_flat_otherwise(modality, kind, field):
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    shaped = one(modality, array.tobytes(), dtype="float32", shape=[2, 3])
    assert isinstance(shaped, kind)
    np.testing.assert_array_equal(getattr(shaped, field), array)
    flat = getattr(one(modality, array.tobytes()), field)
    assert (flat.shape, flat.dtype) == ((6,), np.float32)
    assert getattr(one(modality, b"", shape=[0, 7]), field).shape == (0, 7)


def test_other_number_types_become_float32():
    half = one("action", np.array([1.5], "<f2").tobytes(), dtype="float16").actions
    brain = one("action", b"\xc0\x3f", dtype="bfloat16").actions
    assert half.dtype == brain.dtype == np.float32
    assert half.tolist() == brain.tolist() == [1.5]


def test_an_encoded_video_and_unknown_kinds_stay_bytes(tmp_path):
    film = b"\0\0\0\x18ftypmp42...."
    chunk = one("video", film)
    assert isinstance(chunk, RawChunk)
    chunk.save(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == film
    assert isinstance(one("video", film, dtype="float32", shape=[4]), LatentChunk)
    scalar = one("scalar", b"\x01\x00\xff\xfe")
    assert (scalar.modality, scalar.data) == ("scalar", b"\x01\x00\xff\xfe")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"no json\n", "JSON"),
        (b"[1]\n", "JSON"),
        (b'{"data": ""}\n', "without modality"),
        (b'{"modality": "image", "data": "%%%"}\n', "base64"),
        (line("action", b"123"), "action of 3 bytes"),
        (line("action", b"1234", shape=[2, 2]), "shape"),
        (line("action", b"1234", dtype="float33"), "float33"),
        (line("audio", b"1234", sample_rate="fast"), "audio"),
        (line("text", b"a") + b'{"modality": "te', "JSON"),
    ],
)
def test_what_makes_no_sense_is_a_failure_that_names_the_server(bad, says):
    with pytest.raises(RequestFailed, match=says) as caught:
        events_of(bad)
    assert URL in str(caught.value)


def test_a_stream_that_was_cut_is_noticed_where_a_last_line_was_promised():
    assert len(events_of(line("text", b"a"))) == 1
    with pytest.raises(RequestFailed, match="before its last line"):
        events_of(line("text", b"a"), headers={PROMISE: "1"})
    last = line("text", finish_reason="stop")
    assert len(events_of(line("text", b"a"), last, headers={PROMISE: "1"})) == 2


def test_an_error_line_comes_after_the_events_before_it():
    reply = Reply(URL, stream=True, request_id="r")
    body = line("text", b"so far") + line("error", "zu spät".encode(), status=504)
    events = reply.feed(body)
    assert next(events).text == "so far"
    with pytest.raises(RequestTimeout, match="zu spät") as caught:
        next(events)
    assert caught.value.partial.text == "so far"
    assert caught.value.status == 504


def test_a_document_is_folded():
    outputs = {
        "text": [entry("é".encode()[:1]), entry("é".encode()[1:], finish_reason="stop")],
        "image": [entry(b"one"), entry(b"two")],
        "action": [entry(np.zeros(4, "<f4").tobytes(), dtype="float32", shape=[2, 2])],
    }
    reply = Reply(URL, stream=False)
    assert not list(reply.feed(json.dumps({"request_id": "r", "outputs": outputs}).encode()))
    assert len(list(reply.finish())) == 4
    result = reply.whole()
    assert (result.text, result.images, result.request_id) == ("é", [b"one", b"two"], "r")
    assert result.actions.shape == (2, 2)
    assert result.finish_reason == "stop"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, InvalidRequest),
        (404, ModelNotFound),
        (408, RequestTimeout),
        (409, InvalidRequest),
        (413, InvalidRequest),
        (422, InvalidRequest),
        (429, EngineOverloaded),
        (499, RequestCancelled),
        (500, RequestFailed),
        (502, RequestFailed),
        (503, EngineOverloaded),
        (504, RequestTimeout),
    ],
)
def test_a_status_has_its_error(status, kind):
    error = refusal("POST", URL, status, {}, b'{"detail": "the words"}')
    assert type(error) in (kind, Refused)
    assert isinstance(error, kind)
    assert (str(error), error.status) == ("the words", status)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.status) == (type(error), "the words", status)


def test_the_server_may_name_the_error_itself():
    error = refusal("POST", URL, 500, {"x-mstar-error": "OutOfMemory"}, b'{"detail": "no room"}')
    assert isinstance(error, OutOfMemory)
    assert isinstance(error_of(503, "the server is draining"), EngineClosed)
    assert isinstance(error_of(500, "x", "SomethingNew"), RequestFailed)
    with pytest.raises(EngineOverloaded):
        events_of(line("error", b"full", status=500, error="EngineOverloaded"))


def test_a_refusal_says_which_field_it_was():
    error = error_of(400, "temperature=9: must be at most 2")
    assert (error.field, error.value, error.allowed) == ("temperature", "9", "must be at most 2")
    assert error_of(400, "no form").field == ""


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"detail": [{"loc": ["body", "text"], "msg": "missing"}]}', "body.text: missing"),
        (b'{"error": {"message": "of OpenAI", "code": null}}', "of OpenAI"),
        (b'{"detail": "Not Found"}', f"POST {URL} answered 500 Internal Server Error"),
        (b"<html>bad</html>", f"POST {URL} answered 500 Internal Server Error"),
        (b"plain words", f"POST {URL} answered 500 Internal Server Error: plain words"),
        (b"\x89PNG\0", f"POST {URL} answered 500 Internal Server Error"),
    ],
)
def test_the_servers_words_are_found(body, says):
    assert str(refusal("POST", URL, 500, {}, body)) == says


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_an_overloaded_server_says_when_to_come_back(headers, seconds):
    assert refusal("POST", URL, 429, headers, b"").retry_after == seconds
