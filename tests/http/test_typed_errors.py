"""Errors keep their type on the way to our clients, and are told in the words of OpenAI's."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from mstar import errors
from mstar.client import AsyncMStarClient, MStarClient
from mstar.engine.traps import sleep
from mstar.errors import ContextTooLong, InvalidRequest
from tests.http.conftest import Site

ERRORS = [
    (errors.EngineClosed("the engine has gone"), 500),
    (errors.EngineOverloaded("the queue is full"), 503),
    (errors.RequestFailed("the walk broke"), 500),
    (errors.OutOfMemory("no room for it"), 500),
    (errors.RequestTimeout("too late"), 504),
    (errors.RequestCancelled("not wanted any more"), 499),
    (errors.ContextTooLong("text", "9 tokens", "the model takes 8"), 400),
    (errors.InvalidRequest("count", 7, "must be less"), 400),
]
EACH = pytest.mark.parametrize(("error", "status"), ERRORS, ids=lambda x: type(x).__name__)
SPEECH = {"model": "every", "input": "x", "response_format": "pcm"}
CHAT = {"model": "every", "messages": [{"role": "user", "content": "x"}]}
IMAGE = {"model": "every", "prompt": "x"}


def refusing(site: Site, monkeypatch, error: Exception) -> None:
    """The model takes no request."""

    def prepare(*_: object) -> None:
        raise error

    monkeypatch.setattr(site.engine.model, "prepare", prepare)


def failing(site: Site, monkeypatch, error: Exception) -> None:
    """Every request fails in the middle."""
    model = site.engine.model

    async def walk(request) -> str:
        request.emit_text(await model.echo("begun"))
        await sleep(0.05)
        raise error

    monkeypatch.setattr(model, "_walk", walk)


def raised(call) -> Exception:
    with pytest.raises(errors.MStarError) as caught:
        call()
    return caught.value


@EACH
@pytest.mark.parametrize("stream", [False, True])
def test_before_the_stream(site, monkeypatch, error, status, stream):
    refusing(site, monkeypatch, error)
    client = MStarClient(site.url)
    found = raised(lambda: list(client.generate(text="x", stream=stream)))
    assert isinstance(found, type(error))
    assert found.status == status or isinstance(error, errors.EngineClosed)
    assert str(error) in str(found)
    assert getattr(found, "retry_after", 1.0) == 1.0


@EACH
def test_in_the_middle_of_the_stream(site, monkeypatch, error, status):
    failing(site, monkeypatch, error)
    seen: list[str] = []

    def take() -> None:
        for event in MStarClient(site.url).stream(text="x"):
            seen.append(event.text)

    found = raised(take)
    assert seen == ["begun"]
    assert isinstance(found, type(error))
    assert found.status == (400 if status < 500 else 500)
    assert getattr(found, "retry_after", 1) == 1
    if isinstance(error, errors.RequestStopped):
        assert found.partial.text == "begun"


def test_the_async_client_gets_them_as_well(site, monkeypatch):
    pytest.importorskip("httpx")
    refusing(site, monkeypatch, errors.OutOfMemory("no room"))

    async def ask() -> None:
        async with AsyncMStarClient(site.url) as client:
            await client.generate(text="x")

    assert isinstance(raised(lambda: asyncio.run(ask())), errors.OutOfMemory)


def test_headers_and_the_last_line_name_the_class(site, monkeypatch):
    error = errors.EngineOverloaded("full")
    refusing(site, monkeypatch, error)
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/audio/speech", SPEECH),
        ("/v1/images/generations", IMAGE),
    ):
        reply = site.post(path, json=body)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert reply.headers["x-mstar-error"] == "EngineOverloaded"
    monkeypatch.undo()
    failing(site, monkeypatch, error)
    last = json.loads(site.post(data={"text": "x"}).text.splitlines()[-1])
    expected = {"status": 500, "error": "EngineOverloaded", "retry_after": 1}
    assert last["metadata"] == expected


def test_base_urls_are_not_those_of_openais_clients(site):
    found = raised(lambda: MStarClient(f"{site.url}/v1").generate(text="x"))
    assert "base_url must not end in /v1" in str(found)


# OpenAI's words.


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", CHAT, "messages"),
        ("/v1/chat/completions", {**CHAT, "stream": True}, "messages"),
        ("/v1/audio/speech", SPEECH, "input"),
        ("/v1/audio/speech", {**SPEECH, "stream_format": "sse"}, "input"),
        ("/v1/images/generations", IMAGE, "prompt"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "code"),
    [(ContextTooLong, "context_length_exceeded"), (InvalidRequest, "invalid_value")],
)
def test_the_text_of_the_engine_is_a_field_of_the_client(
    site, monkeypatch, path, body, param, kind, code
):
    refusing(site, monkeypatch, kind("text", "9 tokens", "the model takes 8"))
    reply = site.post(path, json=body)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert (error["param"], error["code"]) == (param, code)
    assert "the model takes 8" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", CHAT), ("/v1/audio/speech", SPEECH)],
)
def test_parameters_are_named_as_the_client_named_them(site, monkeypatch, path, body):
    refusing(site, monkeypatch, InvalidRequest("max_output_tokens", 7, "is too many"))
    error = site.post(path, json={**body, "max_tokens": 7}).json()["error"]
    assert error["param"] == "max_tokens"


@pytest.mark.parametrize("field", ["images", "audio", "video"])
def test_media_are_part_of_the_messages(site, monkeypatch, field):
    refusing(site, monkeypatch, InvalidRequest(field, "image", "is broken"))
    assert site.post("/v1/chat/completions", json=CHAT).json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/audio/speech", SPEECH),
        ("/v1/images/generations", IMAGE),
    ],
)
def test_deadlines_are_named_by_where_they_stand(site, path, body):
    reply = site.post(path, json=body, headers={"x-request-timeout": "soon"})
    assert reply.json()["error"]["param"] == "x-request-timeout"
    reply = site.post(path, json={**body, "timeout": -1})
    assert reply.json()["error"]["param"] == "timeout"


def test_a_prompt_without_room_is_too_long_for_the_context(speaker, monkeypatch):
    monkeypatch.setattr(speaker.engine.model, "longest", 8)
    reply = speaker.post("/v1/audio/speech", json={"model": "tts-1", "input": "hello there " * 9})
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")


# Fields in `extra_body`.


@pytest.mark.parametrize(
    ("path", "body", "nested", "param"),
    [
        ("/v1/chat/completions", CHAT, {"temperature": 9}, "temperature"),
        ("/v1/audio/speech", SPEECH, {"speed": 9}, "speed"),
        ("/v1/audio/speech", SPEECH, {"voice": "nobody"}, "voice"),
        ("/v1/images/generations", IMAGE, {"size": "huge"}, "size"),
        ("/v1/images/generations", IMAGE, {"n": 11}, "n"),
        ("/v1/images/edits", IMAGE, {"images": ["nothing"]}, "images"),
        ("/v1/audio/speech", {**SPEECH, "speed": 2}, {"speed": 3}, "extra_body.speed"),
        ("/v1/images/generations", IMAGE, "x", "extra_body"),
    ],
)
def test_fields_inside_extra_body_are_fields(site, path, body, nested, param):
    reply = site.post(path, json={**body, "extra_body": nested})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


# The log.


def lines_of(caplog, count: int) -> list[dict]:
    end = time.monotonic() + 5
    while len(caplog.records) < count:
        assert time.monotonic() < end
        time.sleep(0.01)
    return [json.loads(record.getMessage()) for record in caplog.records]


def test_the_line_of_a_refusal_says_why_and_holds_no_value(site, caplog):
    with caplog.at_level("INFO", "mstar.http"):
        site.post("/v1/audio/speech", json={**SPEECH, "voice": "secret\nvoice"})
        site.post(data={"text": "x" * 200_001})
        site.post(data={"text": "x", "a\nb" * 500: "y"})
        lines = lines_of(caplog, 3)
    assert [line["status"] for line in lines] == [400, 400, 400]
    assert (lines[0]["error"], lines[0]["param"]) == ("InvalidRequest", "voice")
    assert "must be one of Ethan" in lines[0]["message"]
    assert "secret" not in caplog.text
    assert lines[1]["param"] == "text"
    assert max(len(record.getMessage()) for record in caplog.records) < 1000
    assert not any("\n" in record.getMessage() for record in caplog.records)


def test_the_line_of_a_failure_says_what_failed(site, caplog, monkeypatch):
    failing(site, monkeypatch, errors.OutOfMemory("no room"))
    with caplog.at_level("INFO", "mstar.http"):
        site.post(data={"text": "x"})
        site.post("/v1/chat/completions", json={**CHAT, "stream": True})
        lines = lines_of(caplog, 2)
    assert [(line["error"], line["message"]) for line in lines] == [("OutOfMemory", "no room")] * 2


def test_the_line_of_several_choices_holds_their_sum(site, caplog):
    with caplog.at_level("INFO", "mstar.http"):
        assert site.post("/v1/chat/completions", json={**CHAT, "n": 3, "count": 5}).ok
        (line,) = lines_of(caplog, 1)
    assert line["generated_tokens"] == 15
