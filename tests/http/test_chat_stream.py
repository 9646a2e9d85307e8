"""`/v1/chat/completions` as a stream, driven by openai-python."""

from __future__ import annotations

import json
import socket
import time

import pytest

from tests.http.chatting import HELLO, ask, client, events_of, openai, post  # noqa: F401
from tests.waiting import until


def test_chunks_come_in_openais_order(client):  # noqa: F811
    chunks = list(ask(client, stream=True))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert "".join(delta.content or "" for delta in deltas) == "0 1 2 "
    assert deltas[-1].model_dump(exclude_unset=True) == {}
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_the_wire_is_plain_server_sent_events(site):
    reply = post(site, stream=True)
    events = events_of(reply)
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert all("usage" not in event for event in events)
    assert events[-1]["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    ]


def test_pieces_come_as_they_are_made(client):  # noqa: F811
    times = []
    for chunk in ask(client, stream=True, count=2, pause=0.2):
        if chunk.choices[0].delta.content:
            times.append(time.monotonic())
    assert times[1] - times[0] > 0.1


def test_a_cut_stream_says_so(client):  # noqa: F811
    *_, last = ask(client, stream=True, max_completion_tokens=1)
    assert last.choices[0].finish_reason == "length"


def test_the_usage_is_one_more_chunk(client):  # noqa: F811
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 0


def test_null_usage_is_written_out(site):
    options = {"include_usage": True, "include_obfuscation": False}
    *chunks, last = events_of(post(site, stream=True, stream_options=options))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"]["total_tokens"] == 3


def test_the_usage_may_come_along_with_every_chunk(site):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events_of(post(site, stream=True, pause=0.02, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 3)
    assert len(set(counts)) == 3


def test_choices_go_side_by_side(client):  # noqa: F811
    texts, ends = {}, {}
    order = []
    for chunk in ask(client, stream=True, n=3, count=4, pause=0.02):
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        ends[choice.index] = choice.finish_reason
        order.append(choice.index)
    assert texts == dict.fromkeys(range(3), "0 1 2 3 ")
    assert ends == dict.fromkeys(range(3), "stop")
    assert order != sorted(order)


def test_probabilities_come_with_their_pieces(client):  # noqa: F811
    tokens = []
    for chunk in ask(client, stream=True, logprobs=True, top_logprobs=1):
        (choice,) = chunk.choices
        if choice.logprobs is not None:
            tokens += choice.logprobs.content
            text = "".join(token.token for token in choice.logprobs.content)
            assert text == choice.delta.content
    assert [token.token for token in tokens] == ["0 ", "1 ", "2 "]
    assert tokens[0].top_logprobs[0].logprob == -1.0


def test_images_are_parts_of_a_piece(site):
    events = events_of(post(site, stream=True, modalities=["text", "image"], count=1))
    contents = [event["choices"][0]["delta"].get("content") for event in events]
    (image,) = next(content for content in contents if isinstance(content, list))
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_a_failure_in_the_middle_is_told_in_the_stream(site, client):  # noqa: F811
    stream = ask(client, stream=True, late_poison=True, pause=0.02)
    with pytest.raises(openai.APIError, match="poison in the batch"):
        list(stream)
    reply = post(site, stream=True, late_poison=True, pause=0.02)
    last = json.loads(reply.text.split("\n\n")[-2].removeprefix("data: "))
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert last["error"]["type"] == "server_error"


def test_a_failure_before_the_first_piece_is_a_status(site):
    reply = post(site, stream=True, hang=True, timeout=0.05)
    assert reply.status_code == 504


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_all_choices(site, stream):
    fields = {"model": "every", "messages": HELLO, "hang": True, "n": 2, "stream": stream}
    body = json.dumps(fields)
    host = site.url.removeprefix("http://")
    connection = socket.create_connection(host.split(":"), timeout=10)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    connection.sendall((head + body).encode())
    until(lambda: site.engine.model.open_walks == 2)
    connection.close()
    until(lambda: site.engine.model.open_walks == 0)
    until(lambda: not site.app.state.front.live)


def test_closing_the_stream_cancels_it(site, client):  # noqa: F811
    stream = ask(client, stream=True, count=1000, pause=0.02)
    next(iter(stream))
    stream.close()
    until(lambda: site.engine.model.open_walks == 0)
