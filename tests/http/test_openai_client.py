"""What openai-python does around a request: retries, raw replies, errors, deadlines, headers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from mstar.client import MStarClient
from tests.http.chatting import HELLO, ask, openai
from tests.http.conftest import Site, every_site
from tests.waiting import until

KEYS = {"message", "type", "param", "code"}
PLAIN = {"model": "every", "messages": HELLO}


@dataclass
class Watched:
    """A client and the replies that it got, those that it hides too."""

    client: Any
    replies: list[Any] = field(default_factory=list)

    @property
    def statuses(self) -> list[int]:
        return [reply.status_code for reply in self.replies]


@contextlib.contextmanager
def watched(site: Site, **options: Any) -> Iterator[Watched]:
    """openai-python with strict parsing and its own way of trying again."""
    found = Watched(None)
    http = openai.DefaultHttpxClient(event_hooks={"response": [found.replies.append]})
    options = {"base_url": f"{site.url}/v1", "api_key": "none", **options}
    with openai.OpenAI(http_client=http, _strict_response_validation=True, **options) as client:
        found.client = client
        yield found


# -- retries ---------------------------------------------------------------------------------------


def test_a_full_server_is_asked_again_when_it_said():
    with every_site({"max_running": 1, "max_queue": 0}) as small, watched(small) as found:
        busy = MStarClient(small.url).stream(text="x", count=100_000, pause=0.01)
        next(busy)

        def make_room(reply: Any) -> None:
            if reply.status_code == 503:
                busy.close()
                until(lambda: small.engine.model.open_walks == 0)

        found.client._client.event_hooks["response"].append(make_room)
        began = time.monotonic()
        assert ask(found.client).choices[0].message.content == "0 1 2 "
        assert found.statuses == [503, 200]
        assert found.replies[0].headers["retry-after"] == "1"
        assert time.monotonic() - began >= 1  # its own first pause would be half of that
        assert found.replies[1].request.headers["x-stainless-retry-count"] == "1"


def test_a_draining_server_is_asked_again_and_then_given_up():
    with every_site() as site, watched(site, max_retries=1) as found:
        site.app.state.front.draining = True
        with pytest.raises(openai.InternalServerError, match="shutting down") as error:
            ask(found.client)
        assert error.value.status_code == 503
        assert found.statuses == [503, 503]


@pytest.mark.parametrize("fields", [{"late_poison": True}, {"hang": True, "timeout": 0.05}])
def test_work_that_failed_is_not_done_again(site, fields):
    with watched(site, max_retries=5) as found:
        with pytest.raises(openai.InternalServerError):
            ask(found.client, extra_body=fields)
        (reply,) = found.replies
        assert reply.headers["x-should-retry"] == "false"


def test_what_is_wrong_is_not_sent_again(site):
    with watched(site, max_retries=5) as found:
        with pytest.raises(openai.BadRequestError):
            ask(found.client, temperature=3)
        with pytest.raises(openai.NotFoundError):
            found.client.models.retrieve("none")
        assert found.statuses == [400, 404]


# -- errors ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[Site]:
    """A server with a key and a small limit of bodies."""
    with every_site(api_key="secret", max_body_mb=0.01) as site:
        yield site


def chat(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{**PLAIN, **fields})


@pytest.mark.parametrize(
    ("call", "kind", "status", "word", "param", "code"),
    [
        (
            lambda c: chat(c, temperature=9),
            "BadRequestError",
            400,
            "invalid_request",
            "temp",
            "inva",
        ),
        (lambda c: chat(c, model="gpt"), "NotFoundError", 404, "invalid", "model", "model_not_fo"),
        (lambda c: c.models.retrieve("a/b"), "NotFoundError", 404, "inv", "model", "model_not_fo"),
        (lambda c: c.post("/nowhere", cast_to=dict), "NotFoundError", 404, "invalid", None, None),
        (lambda c: c.get("/chat/completions", cast_to=dict), "APIStatus", 405, "inva", None, None),
        (
            lambda c: c.embeddings.create(model="every", input="x"),
            "NotFoundError",
            404,
            "invalid",
            None,
            "unsupported_route",
        ),
        (
            lambda c: chat(c, messages=[{"role": "user", "content": "x" * 20_000}]),
            "APIStatusError",
            413,
            "invalid_request",
            None,
            "too_large",
        ),
        (
            lambda c: chat(c.with_options(api_key="wrong")),
            "AuthenticationError",
            401,
            "invalid_request",
            None,
            "invalid_api_key",
        ),
        (
            lambda c: chat(c, extra_body={"late_poison": True}),
            "InternalServerError",
            500,
            "server_error",
            None,
            None,
        ),
        (
            lambda c: chat(c, extra_body={"hang": True, "timeout": 0.05}),
            "InternalServerError",
            504,
            "server_error",
            None,
            None,
        ),
    ],
)
def test_errors_have_their_class_and_always_four_keys(
    guarded, call, kind, status, word, param, code
):
    with (
        watched(guarded, api_key="secret", max_retries=0) as found,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        call(found.client)
    error = caught.value
    assert type(error).__name__.startswith(kind)
    assert error.status_code == status
    body = error.response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == KEYS
    assert error.type.startswith(word)
    assert error.message
    for given, expected in ((error.param, param), (error.code, code)):
        assert (given is None) if expected is None else given.startswith(expected)
    assert error.request_id == error.response.headers["x-request-id"]


def test_an_error_in_a_stream_has_four_keys_too(site):
    with watched(site) as found:
        stream = ask(found.client, stream=True, late_poison=True)
        with pytest.raises(openai.APIError, match="poison in the batch") as error:
            list(stream)
        assert set(error.value.body) == KEYS
        assert error.value.type == "server_error"
        assert found.statuses == [200]  # a stream is never begun again


# -- raw replies -----------------------------------------------------------------------------------


def test_raw_replies_have_headers_and_parse(site):
    with watched(site) as found:
        raw = found.client.chat.completions.with_raw_response.create(
            **PLAIN, extra_headers={"x-request-id": "my-own-id"}
        )
        assert raw.headers["x-request-id"] == "my-own-id"
        assert raw.headers["content-type"] == "application/json"
        assert raw.retries_taken == 0
        completion = raw.parse()
        assert completion.choices[0].message.content == "0 1 2 "
        assert completion._request_id == "my-own-id"


def test_a_streaming_reply_comes_line_by_line(site):
    with watched(site) as found:
        create = found.client.chat.completions.with_streaming_response.create
        with create(**PLAIN, stream=True) as reply:
            lines = list(reply.iter_lines())
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert all(line.startswith("data: ") or not line for line in lines)
        with create(**PLAIN) as reply:
            assert reply.parse().choices[0].message.content == "0 1 2 "


def test_a_streaming_reply_of_speech_goes_to_a_file(site, tmp_path):
    with watched(site) as found:
        create = found.client.audio.speech.with_streaming_response.create
        spoken = {"model": "every", "voice": "Ethan", "input": "x"}
        with create(**spoken, response_format="pcm") as reply:
            reply.stream_to_file(tmp_path / "x.pcm")
        assert (tmp_path / "x.pcm").stat().st_size == 3 * 480


def test_leaving_a_streaming_reply_cancels_it(site):
    with watched(site) as found:
        create = found.client.chat.completions.with_streaming_response.create
        extra = {"count": 100_000, "pause": 0.01}
        with create(**PLAIN, stream=True, extra_body=extra) as reply:
            next(reply.iter_lines())
        until(lambda: site.engine.model.open_walks == 0)


# -- deadlines, headers, names ---------------------------------------------------------------------


def test_a_client_that_waits_no_longer_cancels_its_request(site):
    with watched(site, timeout=0.3, max_retries=0) as found:
        with pytest.raises(openai.APITimeoutError):
            ask(found.client, hang=True)
        until(lambda: site.engine.model.open_walks == 0)
        assert ask(found.client.with_options(timeout=20)).choices[0].finish_reason == "stop"


def test_the_deadline_may_go_along_in_a_header(site):
    with watched(site, default_headers={"x-request-timeout": "0.1"}) as found:
        with pytest.raises(openai.InternalServerError, match=r"not done within 0\.1 s"):
            ask(found.client, hang=True)
        assert found.statuses == [504]


def test_headers_and_queries_of_others_do_no_harm(site):
    options = {
        "organization": "org",
        "project": "p",
        "default_headers": {"x-mine": "yes", "traceparent": "00-1-2-03"},
        "default_query": {"api-version": "2024-10-21"},
    }
    with watched(site, **options) as found:
        assert ask(found.client).choices[0].message.content == "0 1 2 "


def test_models_are_listed_and_found_under_names_with_slashes(site):
    with watched(site) as found:
        listed = list(found.client.models.list())
        assert [model.id for model in listed] == ["tts-1", "org/name", "every"]
        for model in listed:
            assert found.client.models.retrieve(model.id) == model
        with pytest.raises(openai.NotFoundError, match="there is tts-1, org/name, every"):
            found.client.models.retrieve("org/other")


def test_the_async_client_does_it_all_at_once(site):
    async def pieces(client: Any, count: int) -> str:
        stream = await ask(client, stream=True, count=count)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{site.url}/v1",
            api_key="none",
            max_retries=0,
            _strict_response_validation=True,
        ) as client:
            texts = await asyncio.gather(*(pieces(client, n) for n in range(1, 31)))
            assert texts == ["".join(f"{i} " for i in range(n)) for n in range(1, 31)]
            assert [model.id async for model in client.models.list()][1] == "org/name"
            with pytest.raises(openai.BadRequestError, match="temperature"):
                await ask(client, temperature=3)
            with pytest.raises(openai.APITimeoutError):
                await ask(client.with_options(timeout=0.2), hang=True)
            task = asyncio.create_task(ask(client, hang=True))
            while not site.engine.model.open_walks:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            create = client.chat.completions.with_streaming_response.create
            async with create(**PLAIN) as reply:
                assert (await reply.parse()).choices[0].message.content == "0 1 2 "

    asyncio.run(main())
    until(lambda: site.engine.model.open_walks == 0)
