"""`/v1/chat/completions` in one piece, driven by openai-python."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from mstar.http.openai.chat_shapes import logprobs_of, usage_of
from mstar.types import TextChunk, Usage
from tests.http.chatting import HELLO, ask, client, openai, post, told  # noqa: F401
from tests.http.conftest import every_site
from tests.waiting import until


def test_a_completion_has_the_shape_that_openai_gives_it(client, site):  # noqa: F811
    reply = ask(client)
    (choice,) = reply.choices
    assert choice.message.content == "0 1 2 "
    assert choice.finish_reason == "stop"
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == "every"
    assert reply.service_tier == "default"
    assert abs(reply.created - time.time()) < 60
    body = post(site).json()
    assert body["object"] == "chat.completion"
    assert body["system_fingerprint"] == reply.system_fingerprint
    assert body["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "0 1 2 ", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_the_usage_is_the_engines(client):  # noqa: F811
    usage = ask(client, count=5).usage
    assert usage.completion_tokens == 5
    assert usage.total_tokens == usage.prompt_tokens + 5
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert usage.completion_tokens_details.text_tokens == 5
    assert usage.completion_tokens_details.audio_tokens == 0


def test_choices_share_one_prompt_in_the_usage():
    usage = usage_of([Usage(10, 4, 3), Usage(10, 8, 5)], ("text", "audio"))
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        10,
        8,
        18,
    )
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4
    assert "text_tokens" not in usage["completion_tokens_details"]


def test_tokens_of_sound_are_told_where_they_are_counted():
    counted = Usage(10, 0, 7, image_tokens=2, audio_tokens=3, speech_tokens=4)
    usage = usage_of([counted, counted], ("text", "audio"))
    read, made = usage["prompt_tokens_details"], usage["completion_tokens_details"]
    assert (read["text_tokens"], read["audio_tokens"], read["image_tokens"]) == (5, 3, 2)
    assert (made["text_tokens"], made["audio_tokens"]) == (6, 8)
    unknown = usage_of([Usage(10, 0, 7)], ("text", "audio"))["completion_tokens_details"]
    assert not {"text_tokens", "audio_tokens"} & unknown.keys()


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_reply_that_was_cut_says_so(client, field):  # noqa: F811
    reply = ask(client, **{field: 2})
    assert reply.choices[0].message.content == "0 1 "
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize(("stop", "words"), [("2", ["2"]), (["a", "2"], ["a", "2"])])
def test_stop_strings_end_it(client, stop, words):  # noqa: F811
    reply = ask(client, stop=stop)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("0 1 ", "stop")
    assert told(client, stop=stop)["params"]["stop"] == words


def test_fields_become_parameters_of_the_model(client):  # noqa: F811
    fields = {"temperature": 0.5, "top_p": 0.25, "frequency_penalty": -1, "seed": 7}
    extra = {"top_k": 5, "min_tokens": 2, "ignore_eos": True}
    params = told(client, **fields, extra_body=extra, max_completion_tokens=9)["params"]
    wanted = {**fields, **extra, "max_output_tokens": 9}
    assert {name: params[name] for name in wanted} == wanted


def test_all_tokens_have_two_names(client):  # noqa: F811
    assert told(client, extra_body={"top_k": -1})["params"]["top_k"] == 0


def test_parameters_may_be_nested(site, client):  # noqa: F811
    nested = {"temperature": 0.5, "count": 1}
    assert post(site, extra_body=nested).json()["choices"][0]["message"]["content"] == "0 "
    assert told(client, extra_body={"extra_body": {"top_k": 3}})["params"]["top_k"] == 3


NEUTRAL = [
    *({"presence_penalty": 0}, {"min_p": 0}, {"repetition_penalty": 1.0}, {"logit_bias": {}}),
    *({"logprobs": False}, {"top_logprobs": 0}, {"n": 1}, {"stop": []}, {"stop_token_ids": []}),
    *({"response_format": {"type": "text"}}, {"tools": []}, {"functions": []}),
    *({"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}),
    *({"chat_template_kwargs": {}}, {"modalities": ["text"]}, {"stream": False}),
    *({"service_tier": tier} for tier in ("auto", "default", "flex", "scale", "priority", "fast")),
    *({"audio": None}, {"stream_options": None}, {"messages": HELLO}, {"logit_bias": None}),
]
IGNORED = [
    *({"metadata": {"a": "b"}}, {"store": True}, {"user": "me"}, {"safety_identifier": "x"}),
    *({"prompt_cache_key": "x"}, {"prompt_cache_options": {}}, {"prompt_cache_retention": "24h"}),
    *({"verbosity": "low"}, {"reasoning_effort": "high"}, {"moderation": {}}),
    *({"prediction": {"type": "content", "content": "x"}}, {"web_search_options": {}}),
]


@pytest.mark.parametrize("fields", [*NEUTRAL, *IGNORED], ids=str)
def test_what_asks_for_nothing_changes_nothing(site, fields, caplog):
    with caplog.at_level("WARNING", "mstar.http"):
        reply = post(site, **fields)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == "0 1 2 "
    assert reply.json()["service_tier"] == "default"
    assert not caplog.records


def test_unknown_fields_are_ignored_with_one_log_line(site, caplog):
    with caplog.at_level("WARNING", "mstar.http"):
        assert post(site, sparkle=1, glitter={"a": 2}).status_code == 200
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "ignored fields that every does not have: 'sparkle', 'glitter'"


def test_several_choices_have_seeds_that_follow_each_other(client):  # noqa: F811
    reply = ask(client, n=3, seed=40, tell=True)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    seeds = [json.loads(choice.message.content)["params"]["seed"] for choice in reply.choices]
    assert seeds == [40, 41, 42]
    unseeded = ask(client, n=2, tell=True)
    assert [json.loads(c.message.content)["params"]["seed"] for c in unseeded.choices] == [None] * 2
    assert ask(client, n=4, count=2).usage.completion_tokens == 8


def test_probabilities_come_token_by_token(client):  # noqa: F811
    logprobs = ask(client, logprobs=True, top_logprobs=2, count=2).choices[0].logprobs
    assert [token.token for token in logprobs.content] == ["0 ", "1 "]
    assert logprobs.content[0].logprob == -0.5
    assert logprobs.content[0].bytes == [48, 32]
    assert [other.token for other in logprobs.content[0].top_logprobs] == ["0", "1"]
    alone = ask(client, logprobs=True, count=1).choices[0].logprobs
    assert alone.content[0].top_logprobs == []


def test_what_can_hardly_be_has_openais_number():
    entry = {"token": "x", "logprob": float("-inf"), "bytes": None, "top_logprobs": []}
    (token,) = logprobs_of([TextChunk("x", metadata={"logprobs": [entry]})])["content"]
    assert token == {"token": "x", "logprob": -9999.0, "bytes": None, "top_logprobs": []}


def test_images_are_parts_of_the_content(site):
    reply = post(site, modalities=["text", "image"], count=1)
    text, image = reply.json()["choices"][0]["message"]["content"]
    assert text == {"type": "text", "text": "0 "}
    assert image["type"] == "image_url"
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_previews_are_no_part_of_it(site):
    extra = {"width": 32, "height": 32, "preview_every": 2}
    content = post(site, modalities=["text", "image"], **extra).json()["choices"][0]["message"]
    assert [part["type"] for part in content["content"]] == ["image_url"]


def test_a_failure_is_an_answer_with_four_keys(site, client, monkeypatch):  # noqa: F811
    with pytest.raises(openai.InternalServerError, match="poison in the batch") as error:
        ask(client, late_poison=True)
    assert error.value.response.headers["x-should-retry"] == "false"
    assert set(error.value.response.json()["error"]) == {"message", "type", "param", "code"}
    assert error.value.request_id.startswith("req-")


def test_one_choice_that_fails_ends_all(site, client):  # noqa: F811
    with pytest.raises(openai.InternalServerError):
        ask(client, late_poison=True, n=3)
    assert not site.app.state.front.live


@pytest.mark.parametrize("by", ["header", "field"])
def test_a_deadline_ends_it(site, by):
    fields = {"hang": True, **({"timeout": 0.05} if by == "field" else {})}
    headers = {"x-request-timeout": "0.05"} if by == "header" else {}
    body = {"model": "every", "messages": HELLO, **fields}
    reply = site.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 504
    assert "not done within 0.05 s" in reply.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_back():
    with every_site({"max_running": 1, "max_queue": 0}) as site:
        reply = post(site, n=3, hang=True)
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        until(lambda: not site.engine.stats()["requests"]["running"])
        assert post(site).status_code == 200


def test_the_async_client_is_answered_too(site):
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none") as other:
            replies = await asyncio.gather(*[ask(other, count=i) for i in range(1, 9)])
            return [reply.choices[0].message.content for reply in replies]

    made = asyncio.run(main())
    assert made == ["".join(f"{k} " for k in range(i)) for i in range(1, 9)]


def test_other_names_of_the_model_are_echoed(client):  # noqa: F811
    reply = client.chat.completions.create(model="org/name", messages=HELLO)
    assert reply.model == "org/name"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_routes_beside_it_name_it(site, path):
    reply = site.post(path, json={})
    assert reply.status_code == 404
    message = reply.json()["error"]["message"]
    assert "use POST /v1/audio/speech or POST /v1/chat/completions" in message


def test_a_model_that_does_not_chat_names_what_to_use(speaker):
    reply = post(speaker)
    assert reply.status_code == 404
    assert "use POST /v1/audio/speech" in reply.json()["error"]["message"]
