"""`POST /generate`, as clients see it."""

from __future__ import annotations

import base64
import gc
import json
import socket
import threading
import time
import weakref

import numpy as np
import pytest
import requests

from mstar.http import middleware, wire
from mstar.http.record import Record
from mstar.types import AudioBuffer, AudioChunk
from tests.every_modality import PNG, picture
from tests.http.conftest import Site, every_site
from tests.waiting import until


def stream(site: Site, **fields) -> list[dict]:
    reply = site.post(data=fields)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in reply.text.splitlines()]


def kwargs(**values) -> str:
    return json.dumps(values)


def test_a_stream_is_lines_of_three_keys_and_ends_with_how_it_ended(site):
    lines = stream(site, text="hé", request_id="mine", model_kwargs=kwargs(count=2))
    assert all(set(line) == {"modality", "data", "metadata"} for line in lines)
    text = [base64.b64decode(line["data"]).decode() for line in lines]
    assert text == ["hé0 ", "hé1 ", ""]
    last = lines[-1]["metadata"]
    assert last["finish_reason"] == "stop"
    assert last["request_id"] == "mine"
    assert last["usage"]["generated_tokens"] == 2


def test_lines_come_as_they_are_made(site):
    fields = {"text": "x", "model_kwargs": kwargs(count=2, pause=0.3)}
    with requests.post(f"{site.url}/generate", data=fields, stream=True, timeout=30) as reply:
        times = [time.monotonic() for line in reply.iter_lines()]
    assert times[1] - times[0] > 0.2


def test_every_modality_has_its_payload(site):
    wanted = "text,audio,image,action,latent"
    lines = stream(site, text="x", output_modalities=wanted, model_kwargs=kwargs(count=1))
    of = {line["modality"]: line for line in reversed(lines)}
    assert base64.b64decode(of["text"]["data"]) == b"x0 "
    assert np.frombuffer(base64.b64decode(of["audio"]["data"]), "<i2").shape == (240,)
    assert of["audio"]["metadata"].items() >= {"sample_rate": 24000, "num_channels": 1}.items()
    assert base64.b64decode(of["image"]["data"]).startswith(PNG)
    assert of["action"]["metadata"] == {"dtype": "float32", "shape": [2, 7]}
    assert len(base64.b64decode(of["action"]["data"])) == 4 * 14
    assert of["latent"]["metadata"] == {"dtype": "float32", "shape": [1, 3, 4]}


def test_latents_asked_for_as_video_are_called_video(site):
    lines = stream(site, text="x", output_modalities="video", model_kwargs=kwargs(count=1))
    assert lines[0]["modality"] == "video"
    assert lines[0]["metadata"]["shape"] == [1, 3, 4]


def test_without_streaming_there_is_one_document_grouped_by_modality(site):
    reply = site.post(
        data={"text": "x", "streaming": "false", "output_modalities": "text,image,audio"}
    )
    body = reply.json()
    assert set(body) == {"request_id", "outputs"}
    assert set(body["outputs"]) == {"text", "image", "audio"}
    (text,) = body["outputs"]["text"]
    assert base64.b64decode(text["data"]) == b"x0 x1 x2 "
    assert text["metadata"]["finish_reason"] == "stop"
    assert len(body["outputs"]["image"]) == 3
    (audio,) = body["outputs"]["audio"]
    assert len(base64.b64decode(audio["data"])) == 3 * 480


def test_multipart_and_urlencoded_say_the_same(site):
    plain = site.post(data={"text": "x", "streaming": "false", "request_id": "a"})
    parts = site.post(files=[(k, (None, v)) for k, v in plain_fields().items()])
    assert plain.json()["outputs"]["text"][0]["data"] == parts.json()["outputs"]["text"][0]["data"]


def plain_fields() -> dict[str, str]:
    return {"text": "x", "streaming": "false", "request_id": "b"}


@pytest.fixture
def seen(site, monkeypatch):
    """The inputs that the model was given."""
    inputs = []
    prepare = site.engine.model.prepare
    monkeypatch.setattr(
        site.engine.model,
        "prepare",
        lambda given, *rest: (inputs.append(given), prepare(given, *rest))[1],
    )
    return inputs


def test_files_and_text_keep_their_order(site, seen):
    one, two = picture(1, 1, 1), picture(2, 2, 2)
    wav = AudioBuffer(np.zeros(10, np.int16), 24000).to_wav()
    files = [
        ("files", ("../../etc/a.png", one)),
        ("files", ("noname", wav)),
        ("text", (None, "and")),
        ("files", ("b.png", two)),
    ]
    assert site.post(files=files).status_code == 200
    assert seen[0].images == (one, two)
    assert seen[0].audio == (wav,)
    assert seen[0].input_modalities == ("image", "audio", "text", "image")


def test_the_order_that_is_told_may_be_another_than_that_of_the_files(site, seen):
    png, wav = picture(1, 1, 1), AudioBuffer(np.zeros(10, np.int16), 24000).to_wav()
    files = [("files", ("a.wav", wav)), ("files", ("a.png", png))]
    assert site.post(files=files, data={"input_modalities": "image,audio"}).status_code == 200
    assert (seen[0].images, seen[0].audio) == ((png,), (wav,))
    assert seen[0].input_modalities == ("image", "audio")


def test_messages_bring_their_media_as_bytes(site, seen):
    png = picture(1, 1, 1)
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]
    assert site.post(data={"model_kwargs": kwargs(messages=messages)}).status_code == 200
    assert seen[0].messages[0]["content"][0] == {"type": "image", "image": png}


def test_model_kwargs_may_be_longer_than_usual_limits_of_forms(site):
    long = kwargs(count=1) + " " * 900_000
    assert site.post(data={"text": "x", "model_kwargs": long}).status_code == 200


def test_an_error_after_the_first_byte_is_the_last_line(site):
    lines = stream(site, text="x", model_kwargs=kwargs(late_poison=True))
    assert lines[-1]["modality"] == "error"
    assert lines[-1]["metadata"] == {"status": 500, "error": "RequestFailed"}
    assert "poison in the batch" in base64.b64decode(lines[-1]["data"]).decode()


def test_an_error_before_the_first_byte_is_a_status(site):
    reply = site.post(data={"text": "poison"})
    assert reply.status_code == 500
    assert "poison in the batch" in reply.json()["detail"]
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("by", ["header", "parameter"])
def test_a_deadline_ends_a_request(site, by):
    values = {"hang": True, "timeout": 0.05} if by == "parameter" else {"hang": True}
    headers = {"x-request-timeout": "0.05"} if by == "header" else {}
    reply = site.post(data={"text": "x", "model_kwargs": kwargs(**values)}, headers=headers)
    assert reply.status_code == 504
    assert "not done within 0.05 s" in reply.json()["detail"]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_client_that_leaves_cancels_its_request(site, streaming):
    body = f"text=x&streaming={streaming}&model_kwargs=" + kwargs(hang=True)
    host = site.url.removeprefix("http://")
    connection = socket.create_connection(host.split(":"), timeout=10)
    head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/x-www-form-urlencoded\r\n\r\n"
    connection.sendall((head + body).encode())
    until(lambda: site.engine.model.open_walks == 1)
    connection.close()
    until(lambda: site.engine.model.open_walks == 0)
    until(lambda: not site.app.state.front.live)


def test_a_live_request_id_is_taken(site):
    fields = {"text": "x", "request_id": "twin", "model_kwargs": kwargs(count=100, pause=0.05)}
    with requests.post(f"{site.url}/generate", data=fields, stream=True, timeout=30):
        reply = site.post(data=fields)
    assert reply.status_code == 409
    assert "live request" in reply.json()["detail"]
    until(lambda: site.engine.model.open_walks == 0)


def test_a_full_queue_says_when_to_come_back():
    with every_site({"max_running": 1, "max_queue": 0}) as site:
        fields = {"text": "x", "model_kwargs": kwargs(count=1000, pause=0.05)}
        with requests.post(f"{site.url}/generate", data=fields, stream=True, timeout=30):
            reply = site.post(data={"text": "x"})
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert "the limit is 1 + 0" in reply.json()["detail"]


def test_the_event_loop_is_free_while_a_request_is_prepared(site, monkeypatch):
    gate, entered = threading.Event(), threading.Event()
    prepare = site.engine.model.prepare

    def slow(*args):
        entered.set()
        gate.wait(10)
        return prepare(*args)

    monkeypatch.setattr(site.engine.model, "prepare", slow)
    thread = threading.Thread(target=site.post, kwargs={"data": {"text": "x"}})
    thread.start()
    assert entered.wait(10)
    assert site.get("/health").status_code == 200
    gate.set()
    thread.join()


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_request_that_is_over_waits_for_no_garbage_collection(site, monkeypatch, streaming):
    records = []

    class Noted(Record):
        def __init__(self, *args):
            super().__init__(*args)
            records.append(weakref.ref(self))

    monkeypatch.setattr(middleware, "Record", Noted)
    gc.disable()
    try:
        site.post(data={"text": "x", "streaming": streaming})
        assert len(records) == 1
        until(lambda: records[0]() is None)
    finally:
        gc.enable()


def test_many_streams_at_once(site):
    replies: list[list[dict]] = []
    threads = [
        threading.Thread(target=lambda i=i: replies.append(stream(site, text=f"{i}-")))
        for i in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 20
    texts = {b"".join(base64.b64decode(x["data"]) for x in lines).decode() for lines in replies}
    assert texts == {f"{i}-0 {i}-1 {i}-2 " for i in range(20)}


def test_the_short_way_of_sound_writes_what_the_long_way_writes():
    class Longer(AudioChunk):
        """Sound that is not recognised as such at once."""

    for pcm in (
        np.arange(9, dtype=np.int16),
        np.arange(9, dtype=np.int16)[::-2],
        np.zeros(0, "i2"),
    ):
        short, long = (wire.lines([kind(pcm, 24000)], "id", {}) for kind in (AudioChunk, Longer))
        assert short == long
