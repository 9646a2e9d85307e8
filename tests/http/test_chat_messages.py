"""What reaches the model of the messages of a chat."""

from __future__ import annotations

import base64
import json

import pytest

from mstar.errors import InvalidRequest
from mstar.http.messages import Media, read_messages
from mstar.http.openai.chat_fields import parameter_values
from mstar.http.openai.chat_request import ChatAsk
from mstar.http.openai.surfaces import surfaces_of
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters
from tests.every_modality import CARD, described
from tests.http.chatting import (  # noqa: F401
    client,
    data_url,
    openai,
    post,
    small_png,
    small_wav,
    told,
)


def user(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def seen(client, messages: list[dict]) -> list[dict]:  # noqa: F811
    return told(client, messages=messages)["messages"]


def test_a_history_keeps_its_order_and_its_roles(client):  # noqa: F811
    history = [
        {"role": "developer", "content": "be brief"},
        {"role": "system", "content": [{"type": "text", "text": "and kind"}]},
        {"role": "user", "content": "hello", "name": "ann"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": ""},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]
    assert seen(client, history) == [
        {"role": "system", "content": "be brief"},
        {"role": "system", "content": [{"type": "text", "text": "and kind"}]},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": ""},
        {"role": "tool", "content": "42"},
    ]


def test_a_reply_goes_back_as_it_came(client):  # noqa: F811
    reply = client.chat.completions.create(model="every", messages=[*user_text("x")])
    earlier = reply.choices[0].message.model_dump()
    assert seen(client, [*user_text("x"), earlier])[1] == {"role": "assistant", "content": "0 1 2 "}


def user_text(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_a_refusal_is_text(client):  # noqa: F811
    history = [
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "never"}]},
    ]
    assert [message["content"] for message in seen(client, history)] == [
        "no",
        [{"type": "text", "text": "never"}],
    ]


@pytest.mark.parametrize("detail", [None, "auto", "low", "high", "original"])
def test_images_come_as_bytes(client, detail):  # noqa: F811
    png = small_png()
    image = {"url": data_url(png), **({"detail": detail} if detail else {})}
    parts = user({"type": "text", "text": "?"}, {"type": "image_url", "image_url": image})
    assert seen(client, parts)[0]["content"] == [
        {"type": "text", "text": "?"},
        {"type": "image", "image": described(png)},
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "audio_url", "audio_url": {"url": data_url(small_wav(), "audio/wav")}},
        {"type": "audio_url", "audio_url": data_url(small_wav(), "audio/wav")},
        {
            "type": "input_audio",
            "input_audio": {"data": base64.b64encode(small_wav()).decode(), "format": "wav"},
        },
        {"type": "input_audio", "input_audio": {"data": data_url(small_wav(), "")}},
        {
            "type": "file",
            "file": {"file_data": data_url(small_wav(), "audio/wav"), "filename": "a.wav"},
        },
        {"type": "file", "file": {"file_data": base64.b64encode(small_wav()).decode()}},
    ],
)
def test_sound_has_several_forms(client, part):  # noqa: F811
    assert seen(client, user(part))[0]["content"] == [
        {"type": "audio", "audio": described(small_wav())}
    ]


def test_a_file_is_what_it_holds(client):  # noqa: F811
    file = {"file_data": data_url(small_png(), "application/pdf"), "filename": "a.png"}
    content = seen(client, user({"type": "file", "file": file}))[0]["content"]
    assert content == [{"type": "image", "image": described(small_png())}]


def test_images_of_earlier_replies_may_come_back(client):  # noqa: F811
    image = {"type": "image_url", "image_url": {"url": data_url(small_png())}}
    history = [{"role": "assistant", "content": [image]}, *user({"type": "text", "text": "again"})]
    assert seen(client, history)[0]["content"][0]["type"] == "image"


def test_the_native_route_reads_the_same_messages(site, client):  # noqa: F811
    image = {"type": "image_url", "image_url": {"url": data_url(small_png())}}
    messages = [{"role": "developer", "content": "x"}, *user(image)]
    form = {"model_kwargs": json.dumps({"messages": messages, "tell": True}), "streaming": "false"}
    text = site.post(data=form).json()["outputs"]["text"][0]["data"]
    assert json.loads(base64.b64decode(text))["messages"] == seen(client, messages)


def test_reading_leaves_media_where_they_are():
    url = "https://example.com/a.mp4"
    messages = user({"type": "video_url", "video_url": {"url": url}})
    (message,) = read_messages(CARD, messages, longest=100)
    place = "messages[0].content[0].video_url"
    assert message["content"] == [{"type": "video", "video": Media("video", url, place)}]


# -- models with words of their own --------------------------------------------------------------

TALKER = ModelCard(
    name="talker",
    title="a card with names of its own",
    entry="nowhere:Nothing",
    inputs=("text",),
    outputs=("text", "image"),
    parameters=Parameters(
        "talker",
        [
            Parameter("thinker_temperature", float, 0.7, low=0, high=1, aliases=("temperature",)),
            Parameter("thinker_max_tokens", int, 100, low=1, aliases=("max_output_tokens",)),
            Parameter("chat_template_kwargs", dict, {}, accepts="an object"),
        ],
    ),
    repos={},
    chat=True,
)


def test_fields_set_the_parameters_that_go_by_their_names():
    fields = {"temperature": 0.5, "max_completion_tokens": 7, "chat_template_kwargs": {"a": 1}}
    values, field_of = parameter_values(TALKER, fields)
    assert values == {
        "thinker_temperature": 0.5,
        "thinker_max_tokens": 7,
        "chat_template_kwargs": {"a": 1},
    }
    assert field_of["thinker_max_tokens"] == "max_completion_tokens"


def test_a_card_tells_its_surface():
    assert surfaces_of(CARD).chat == ("text", "audio", "image")
    assert surfaces_of(TALKER).chat == ("text", "image")
    silent = ModelCard(
        name="a",
        title="",
        entry="",
        inputs=("text",),
        outputs=("action",),
        parameters=Parameters("a", []),
        repos={},
        chat=True,
    )
    assert surfaces_of(silent).chat is None


def test_a_mistake_is_told_in_the_words_of_the_request():
    ask = ChatAsk("talker", [], {"thinker_temperature": "temperature"})
    error = ask.renamed(InvalidRequest("thinker_temperature", 1.5, "must be less"))
    assert str(error) == "temperature=1.5: must be less"
    other = ValueError("x")
    assert ask.renamed(other) is other


def test_what_the_model_refuses_later_is_renamed_too(site, monkeypatch):
    def refuse(inputs, params, outputs):
        raise InvalidRequest("max_output_tokens", 9, "there is no room")

    monkeypatch.setattr(site.engine.model, "prepare", refuse)
    for stream in (False, True):
        reply = post(site, max_completion_tokens=9, stream=stream)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "max_completion_tokens"


def test_null_messages_on_the_native_route_are_none(site):
    form = {"text": "x", "model_kwargs": json.dumps({"messages": None}), "streaming": "false"}
    assert site.post(data=form).status_code == 200
