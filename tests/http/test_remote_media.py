"""Media from other servers: a loopback server stands for the Internet, a script for its names."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import ssl
import subprocess
import sys
import threading
import time

import pytest
import requests

from mstar.errors import InvalidRequest
from mstar.http import remote
from mstar.http.allowance import Allowance, new_allowance
from mstar.http.front import Front
from mstar.http.media import media_bytes
from mstar.http.settings import Settings
from tests.broken_media import png as huge_png
from tests.http.conftest import every_site
from tests.http.internet import IMAGE, PRIVATE, PUBLIC, Internet, answer, to
from tests.waiting import until


@pytest.fixture
def internet(monkeypatch):
    internet = Internet()
    monkeypatch.setattr(remote, "resolve", internet.resolve)
    monkeypatch.setattr(remote, "is_public", lambda text: text == PUBLIC)
    yield internet
    internet.close()


def front_of(**settings) -> Front:
    front = object.__new__(Front)
    front.settings = Settings(**{"allow_remote_media": True, **settings})
    return front


def get(url: str, kind: str = "image", **settings) -> bytes:
    return asyncio.run(media_bytes(front_of(**settings), kind, url, "messages[0]"))


def refused(url: str, kind: str = "image", **settings) -> str:
    with pytest.raises(InvalidRequest) as error:
        get(url, kind, **settings)
    assert error.value.field == "messages[0]"
    assert "secret" not in str(error.value)
    return error.value.allowed


def test_media_are_fetched(internet):
    assert get(internet.url()) == IMAGE
    (request,) = internet.requests
    head = request.decode().split("\r\n")
    assert head[0] == "GET /a.png HTTP/1.1"
    assert f"Host: example.com:{internet.port}" in head
    assert "Accept-Encoding: identity" in head
    assert not any(line.lower().startswith(("cookie", "authorization", "referer")) for line in head)


def test_off_means_that_nothing_is_looked_up(internet):
    assert "--allow-remote-media" in refused(internet.url(), allow_remote_media=False)
    assert internet.lookups == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user@example.com/a.png", "must not hold a user name"),
        ("http://user:pass@example.com/a.png", "must not hold a user name"),
        ("http://example.com@127.0.0.2/a.png", "must not hold a user name"),
        ("http:///a.png", "names no host"),
        ("http://", "names no host"),
        ("http:a.png", "names no host"),
        ("http://exa mple.com/a.png", "is not a URL"),
        ("http://example.com\\@127.0.0.2/", "is not a URL"),
        ("http://example.com/a\r\nHost: b", "is not a URL"),
        ("http://example.com/a\tb", "is not a URL"),
        ("http://[::1/a.png", "is not a URL"),
        ("http://example.com:99999/", "is not a URL"),
        ("http://example.com:x/", "is not a URL"),
        ("http://example.com:0/", "names no host"),
        ("http://127%2e0.0.1/", "names no host"),
        ("http://[fe80::1%25eth0]/", "names no host"),
        (f"http://{'a' * 300}.com/", "names no host"),
        (f"http://{'a' * 64}.com/", "names no host"),
        (f"http://example.com/{'a' * 9000}", "is not a URL"),
        ("http://unknown.example/", "its host is not known"),
        ("ftp://example.com/a.png", "--media-dir"),
        ("gopher://example.com/a.png", "--media-dir"),
        ("//example.com/a.png", "--media-dir"),
        ("", "--media-dir"),
    ],
)
def test_urls_that_lead_nowhere(internet, url, message):
    assert message in refused(url)
    assert internet.requests == []


def test_every_address_of_a_name_must_be_public(internet):
    internet.names["mixed.example"] = [PUBLIC, PRIVATE]
    assert "not at a public address" in refused(internet.url(host="mixed.example"))
    assert internet.requests == []


def test_the_address_that_was_checked_is_the_one_that_is_asked(internet):
    internet.names["rebinding.example"] = [[PUBLIC], [PRIVATE], [PRIVATE]]
    assert get(internet.url(host="rebinding.example")) == IMAGE
    assert internet.lookups == ["rebinding.example"]
    assert "not at a public address" in refused(internet.url(host="rebinding.example"))


def test_a_name_that_turns_private_is_seen_at_the_redirect(internet):
    internet.names["rebinding.example"] = [[PUBLIC], [PRIVATE]]
    internet.answers["/again"] = to("/a.png")
    assert "not at a public address" in refused(internet.url("/again", "rebinding.example"))
    assert len(internet.requests) == 1


def test_the_real_predicate_refuses_this_machine(internet, monkeypatch):
    monkeypatch.undo()
    for host in ("127.0.0.1", "[::1]", "0.0.0.0", "2130706433", "0x7f.1", "017700000001", "0"):
        assert "not at a public address" in refused(internet.url(host=host))
    assert internet.requests == []


@pytest.mark.parametrize("status", ["301 x", "302 x", "303 x", "307 x", "308 x"])
def test_redirects_are_followed(internet, status):
    internet.answers["/one"] = to("two?x=1#y", status)
    internet.answers["/two?x=1"] = to(internet.url())
    assert get(internet.url("/one")) == IMAGE


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("http://127.0.0.2/a.png", "not at a public address"),
        ("//private.example/a.png", "not at a public address"),
        ("http://user@example.com/", "user name"),
        ("file:///etc/passwd", "neither http nor https"),
        ("ftp://example.com/", "neither http nor https"),
        ("data:image/png;base64,aGVsbG8=", "neither http nor https"),
        ("javascript:alert(1)", "neither http nor https"),
        ("http://[::1", "cannot be reached or breaks off"),
        ("/loop", "redirects more than 5 times"),
        ("", "redirects more than 5 times"),
    ],
)
def test_redirects_are_checked(internet, place, message):
    internet.names |= {"private.example": [PRIVATE], "127.0.0.2": [PRIVATE]}
    internet.answers["/loop"] = to(place)
    assert message in refused(internet.url("/loop"))
    assert len(internet.requests) == (6 if "5 times" in message else 1)


@pytest.mark.parametrize(
    ("answered", "message"),
    [
        (answer(b"secret", status="404 Not Found"), "answers with status 404"),
        (answer(b"secret", status="500 secret"), "answers with status 500"),
        (answer(b"", status="204 No Content"), "answers with status 204"),
        (answer(IMAGE, status="206 Partial Content"), "answers with status 206"),
        (answer(gzip.compress(bytes(10**6)), "Content-Encoding: gzip"), "compressed"),
        (answer(b"x", "Content-Encoding: br"), "compressed"),
        (answer(b"x", "Content-Encoding: identity, gzip"), "compressed"),
        (answer(b"x", "Transfer-Encoding: gzip, chunked"), "unknown coding"),
        (answer(IMAGE, length=10**9), "more bytes than this server takes"),
        (answer(IMAGE, length=len(IMAGE) + 1), "breaks off"),
        (answer(IMAGE, length=10), "header of the image|is no image"),
        (answer(b""), "holds nothing"),
        (answer(b"<html>secret</html>"), "holds text"),
        (answer(huge_png(50_000, 50_000)), "more than"),
        ([b"HTTP/1.1 200 OK\r\n\r\n" + bytes(65536)] * 40, "more bytes than this server takes"),
        (
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]
            + [b"10000\r\n" + bytes(65536) + b"\r\n"] * 40,
            "more bytes than this server takes",
        ),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"], "breaks off"),
        ([b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200], "breaks off"),
        ([b"HTTP/1.1 200 OK\r\n" + b"a" * 100_000], "breaks off"),
        ([b"secret\r\n\r\n"], "breaks off"),
        ([], "breaks off"),
    ],
)
def test_bad_answers(internet, answered, message):
    internet.answers["/bad"] = answered
    said = refused(internet.url("/bad"), max_body_mb=1)
    assert any(words in said for words in message.split("|")), said


@pytest.mark.parametrize(
    "answered",
    [
        [5.0],
        [b"HTTP/1.1 200 OK\r\n", *[b"a: b\r\n", 0.05] * 100],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", *[b"x", 0.05] * 100],
        [b"HTTP/1.1 100 Continue\r\n\r\n", 0.05] * 100,
    ],
    ids=["silent", "slow headers", "slow body", "endless promises"],
)
def test_what_is_slow_is_given_up(internet, answered):
    internet.answers["/slow"] = answered
    began = time.monotonic()
    assert "did not come in time" in refused(internet.url("/slow"), body_timeout=0.3)
    assert time.monotonic() - began < 1.5
    until(lambda: not any("fetch" in thread.name for thread in busy_threads()))


def busy_threads() -> list[threading.Thread]:
    """Threads of downloads that are in the middle of one."""
    frames = sys._current_frames()
    found = []
    for thread in threading.enumerate():
        frame = frames.get(thread.ident)
        while thread.name.startswith("mstar-fetch") and frame is not None:
            if frame.f_code.co_name == "run" and frame.f_code.co_filename == remote.__file__:
                found.append(thread)
            frame = frame.f_back
    return found


def test_many_slow_ones_leave_the_event_loop_and_the_other_workers_free(internet):
    internet.answers["/slow"] = [0.4, *answer()]

    async def main() -> None:
        front = front_of()
        slow = [media_bytes(front, "image", internet.url("/slow"), "x") for _ in range(20)]
        tasks = [asyncio.ensure_future(one) for one in slow]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await media_bytes(front, "image", data_url(IMAGE), "x")
        assert time.monotonic() - began < 0.2
        assert await asyncio.gather(*tasks) == [IMAGE] * 20

    asyncio.run(main())


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_who_no_longer_waits_ends_the_download(internet):
    internet.answers["/slow"] = [5.0, *answer()]

    async def main() -> None:
        task = asyncio.ensure_future(media_bytes(front_of(), "image", internet.url("/slow"), "x"))
        while not internet.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    began = time.monotonic()
    asyncio.run(main())
    while busy_threads():
        time.sleep(0.01)
    assert time.monotonic() - began < 2


def test_the_media_of_one_request_share_its_limits(internet):
    front = front_of(max_body_mb=3 * len(IMAGE) / 2**20)

    async def main(count: int) -> None:
        new_allowance(front.settings)
        for _ in range(count):
            await media_bytes(front, "image", internet.url(), "x")

    asyncio.run(main(3))
    with pytest.raises(InvalidRequest, match="more bytes than"):
        asyncio.run(main(4))
    front = front_of()
    Allowance.most, before = 3, Allowance.most
    try:
        asyncio.run(main(3))
        with pytest.raises(InvalidRequest, match="more than 3 media"):
            asyncio.run(main(4))
    finally:
        Allowance.most = before


def test_requests_of_one_connection_have_limits_of_their_own(internet):
    part = {"type": "image_url", "image_url": {"url": internet.url()}}
    messages = [{"role": "user", "content": [part, part, {"type": "text", "text": "?"}]}]
    form = {"model_kwargs": json.dumps({"messages": messages, "tell": True})}
    limit = 2.5 * len(IMAGE) + len(json.dumps(form))
    options = {"allow_remote_media": True, "max_body_mb": limit / 2**20}
    with every_site(**options) as site, requests.Session() as session:
        for _ in range(4):
            reply = session.post(f"{site.url}/generate", data=form, timeout=10)
            assert reply.status_code == 200, reply.text
            assert f"{len(IMAGE)} bytes" in base64_text(reply.text)


def base64_text(lines: str) -> str:
    """The text of an NDJSON answer."""
    chunks = [json.loads(line) for line in lines.splitlines()]
    return "".join(base64.b64decode(one.get("data") or "").decode() for one in chunks)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of example.com, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += " -subj /CN=example.com -addext subjectAltName=DNS:example.com"
    try:
        subprocess.run(
            [*command.split(), "-keyout", key, "-out", cert],
            check=True,
            capture_output=True,
            timeout=30,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no openssl to make a certificate with")
    return cert, key


def test_tls_goes_to_the_address_and_is_checked_for_the_name(internet, certificate, monkeypatch):
    internet.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    internet.context.load_cert_chain(*certificate)
    asked = []
    internet.context.sni_callback = lambda _, name, __: asked.append(name)
    internet.names["other.example"] = [PUBLIC]
    assert "no valid certificate" in refused(internet.url(scheme="https"))
    trusting = ssl.create_default_context(cafile=certificate[0])
    monkeypatch.setattr(remote, "tls_context", lambda: trusting)
    assert get(internet.url(scheme="https")) == IMAGE
    assert "no valid certificate" in refused(internet.url(host="other.example", scheme="https"))
    assert asked == ["example.com", "example.com", "other.example"]
