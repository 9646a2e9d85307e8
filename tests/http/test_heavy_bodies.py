"""Bodies that are small on the wire and large once they are read, and many of them at a time."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
import requests
from PIL import Image

from tests.http.conftest import Site, every_site

MIB = 2**20
FORM = {"content-type": "application/x-www-form-urlencoded"}


@pytest.fixture(scope="module")
def large():
    """Takes bodies of 64 MiB."""
    with every_site() as site:
        yield site


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()


class Probe:
    """Asks for `/health` again and again while the block runs; `slowest` is in seconds."""

    def __init__(self, site: Site) -> None:
        self._site, self._over = site, threading.Event()
        self.slowest = 0.0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with requests.Session() as session:
            while not self._over.is_set():
                began = time.perf_counter()
                assert session.get(f"{self._site.url}/health", timeout=30).status_code == 200
                self.slowest = max(self.slowest, time.perf_counter() - began)


HEAVY = {
    "lists": b'{"a":[' + b"[]," * (20 * MIB // 3) + b"1]}",
    "objects": b'{"a":[' + b"{}," * (20 * MIB // 3) + b"1]}",
    "numbers": b'{"a":[' + b"1," * (10 * MIB) + b"1]}",
    "keys": b"{" + b",".join(b'"%d":1' % i for i in range(1_000_000)) + b"}",
}


@pytest.mark.parametrize("kind", HEAVY)
def test_json_of_many_tiny_things_is_refused_before_it_is_parsed(large, kind):
    with Probe(large) as probe:
        reply = large.post(
            "/v1/chat/completions", data=HEAVY[kind], headers={"content-type": "application/json"}
        )
    assert reply.status_code == 413
    assert "the body has more than 400000 values and keys" in reply.json()["error"]["message"]
    assert probe.slowest < 0.5


def test_model_kwargs_of_many_tiny_things_are_refused(large):
    files = {"text": (None, "x"), "model_kwargs": (None, HEAVY["lists"])}
    with Probe(large) as probe:
        reply = large.post(files=files)
    assert reply.status_code == 413
    assert "model_kwargs has more than" in reply.json()["detail"]
    assert probe.slowest < 0.5


@pytest.mark.parametrize("name", ["cfg[]", "cfg[a]", "stop"])
def test_values_in_forms_of_edits_are_counted_as_well(large, name):
    files = {"prompt": (None, "x"), "image": png(32, 32), name: (None, HEAVY["lists"])}
    with Probe(large) as probe:
        reply = large.post("/v1/images/edits", files=files)
    assert reply.status_code in (413, 200)
    assert probe.slowest < 0.5


def test_urlencoded_bodies_hold_text_only_so_they_are_short(large):
    with Probe(large) as probe:
        reply = large.post(data=b"text=" + b"%41" * (20 * MIB // 3), headers=FORM)
    assert reply.status_code == 413
    assert probe.slowest < 0.5


def test_the_longest_text_fits_into_an_urlencoded_body(large):
    text = "\U0001f600" * large.app.state.front.settings.max_text_chars
    reply = large.post(data={"text": text, "streaming": "false", "model_kwargs": '{"count": 1}'})
    assert reply.status_code == 200


def test_a_long_string_is_no_heavy_body(large):
    data = base64.b64encode(bytes(30 * MIB)).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    body = {"model": "every", "messages": [{"role": "user", "content": [part]}]}
    with Probe(large) as probe:
        reply = large.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert "is no image" in reply.text
    assert probe.slowest < 0.5


def half_sent(site: Site, size: int) -> socket.socket:
    """A connection on which a body of `size` bytes is sent, but for its last byte."""
    parts = urlsplit(site.url)
    wire = socket.create_connection((parts.hostname, parts.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n"
    wire.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + b" " * (size - 1))
    return wire


def test_bodies_in_flight_share_a_budget_that_is_given_back():
    with every_site(max_body_mb=1) as site:
        front = site.app.state.front
        most = front.settings.max_held_bytes
        wires = [half_sent(site, MIB) for _ in range(7)]
        try:
            wires.append(half_sent(site, MIB - 1000))
            end = time.monotonic() + 5
            while front.held < 8 * MIB - 1008:
                assert time.monotonic() < end
                time.sleep(0.01)
            reply = site.post("/v1/chat/completions", json={"model": "x" * 2000})
            assert reply.status_code == 503
            assert reply.headers["retry-after"] == "1"
            assert reply.headers["x-mstar-error"] == "EngineOverloaded"
            assert site.get("/health").status_code == 200
            assert front.held <= most
        finally:
            for wire in wires:
                wire.close()
        end = time.monotonic() + 5
        while front.held:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert site.post(data={"text": "x", "streaming": "false"}).status_code == 200
        assert site.post(data={"text": "poison"}).status_code == 500
        assert site.post(data={"text": "x" * MIB}).status_code == 413
        assert front.held == 0


def test_the_media_of_one_request_share_their_pixels():
    with every_site(max_pixels=64 * 64) as site:
        files = [("files", (f"{i}.png", png(64, 64))) for i in range(4)]
        form = {"text": "x", "streaming": "false"}
        assert site.post(data=form, files=files).status_code == 200
        reply = site.post(data=form, files=[*files, files[0]])
        assert reply.status_code == 400
        assert "more than 16384 pixels together" in reply.json()["detail"]
        url = "data:image/png;base64," + base64.b64encode(png(64, 64)).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}] * 5
        body = {"model": "every", "messages": [{"role": "user", "content": content}]}
        error = site.post("/v1/chat/completions", json=body).json()["error"]
        assert "more than 16384 pixels together" in error["message"]
        assert error["param"] == "messages[0].content[4].image_url"
        body = {"model": "every", "prompt": "x", "images": [url] * 5}
        error = site.post("/v1/images/edits", json=body).json()["error"]
        assert "pixels together" in error["message"]
        assert error["param"] == "images"


def test_submitting_keeps_no_thread_from_other_work(monkeypatch):
    with every_site() as site:
        go, submit = threading.Event(), site.engine.submit

        def slow(**arguments):
            go.wait(20)
            return submit(**arguments)

        monkeypatch.setattr(site.engine, "submit", slow)
        form = {"text": "x", "streaming": "false", "model_kwargs": json.dumps({"count": 1})}
        replies: list[int] = []
        threads = [
            threading.Thread(target=lambda: replies.append(site.post(data=form).status_code))
            for _ in range(40)
        ]
        for thread in threads:
            thread.start()
        try:
            time.sleep(0.3)
            began = time.perf_counter()
            assert site.get("/metrics").status_code == 200
            assert time.perf_counter() - began < 5
            names = [thread.name for thread in threading.enumerate()]
            assert sum(name.startswith("mstar-submit") for name in names) <= 4
        finally:
            go.set()
            for thread in threads:
                thread.join()
        assert replies == [200] * 40
