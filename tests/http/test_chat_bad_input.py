"""What is wrong in a chat request, with the field and the words that it is answered with."""

from __future__ import annotations

import base64
import json

import pytest

from tests.http.chatting import HELLO, data_url, small_png, small_wav

pytest.importorskip("openai")


def body(**fields) -> dict:
    return {"model": "every", "messages": HELLO, **fields}


def content(*parts) -> dict:
    return body(messages=[{"role": "user", "content": list(parts)}])


def message(**fields) -> dict:
    return body(messages=[fields])


def image(url, **fields) -> dict:
    return content({"type": "image_url", "image_url": {"url": url, **fields}})


def file(**fields) -> dict:
    return content({"type": "file", "file": fields})


def sound(**fields) -> dict:
    return content({"type": "input_audio", "input_audio": fields})


FIRST = "messages[0].content[0]"

# Body, field, part of the message.
FIELDS = [
    (body(model=None), "model", "must be the name of a model"),
    (body(model=["every"]), "model", "must be the name of a model"),
    (body(temperature="hot"), "temperature", "must be a number from 0 to 2"),
    (body(temperature=2.1), "temperature", "from 0 to 2"),
    (body(temperature=-0.1), "temperature", "from 0 to 2"),
    (body(temperature=True), "temperature", "must be a number"),
    (body(top_p=1.1), "top_p", "at most 1"),
    (body(top_p=0), "top_p", "above 0"),
    (body(seed=-1), "seed", "from 0"),
    (body(top_p=[0.5]), "top_p", "must be a number"),
    (body(top_k=-2), "top_k", "must be an integer"),
    (body(top_k=1.5), "top_k", "must be an integer"),
    (body(min_p=0.5), "min_p", "every has nothing of the kind"),
    (body(min_p=2), "min_p", "from 0 to 1"),
    (body(repetition_penalty=0), "repetition_penalty", "above 0"),
    (body(repetition_penalty=1.1), "repetition_penalty", "nothing of the kind"),
    (body(presence_penalty=0.5), "presence_penalty", "nothing of the kind"),
    (body(presence_penalty=3), "presence_penalty", "from -2 to 2"),
    (body(frequency_penalty=-2.5), "frequency_penalty", "from -2 to 2"),
    (body(logit_bias={"5": 1}), "logit_bias", "nothing of the kind"),
    (body(logit_bias={"5": 101}), "logit_bias", "from -100 to 100"),
    (body(logit_bias={"five": 1}), "logit_bias", "is not a token id"),
    (body(logit_bias={"5": "1"}), "logit_bias", "must be a number"),
    (body(logit_bias=[1]), "logit_bias", "must be an object"),
    (body(logit_bias={str(i): 0 for i in range(1025)}), "logit_bias", "up to 1024"),
    (body(logprobs=1), "logprobs", "true or false"),
    (body(top_logprobs=3), "top_logprobs", "needs logprobs=true"),
    (body(top_logprobs=3, logprobs=False), "top_logprobs", "needs logprobs=true"),
    (body(top_logprobs=21, logprobs=True), "top_logprobs", "from 0 to 20"),
    (body(top_logprobs=-1, logprobs=True), "top_logprobs", "from 0 to 20"),
    (body(n=0), "n", "from 1 to 16"),
    (body(n=17), "n", "from 1 to 16"),
    (body(n="2"), "n", "must be an integer"),
    (body(n=True), "n", "must be an integer"),
    (body(seed=1.5), "seed", "must be an integer"),
    (body(seed=2**63), "seed", "must be an integer"),
    (body(seed=-1), "seed", "from 0 to"),
    (body(seed="x"), "seed", "must be an integer"),
    (body(seed=2**63 - 1, n=2), "seed", "must be an integer"),
    (body(stop=["a", "b", "c", "d", "e"]), "stop", "a list of up to 4"),
    (body(stop=""), "stop", "not empty"),
    (body(stop=["a", ""]), "stop", "not empty"),
    (body(stop=["a", 1]), "stop", "must be strings"),
    (body(stop=3), "stop", "must be a string or a list"),
    (body(stop_token_ids=[5]), "stop_token_ids", "nothing of the kind"),
    (body(stop_token_ids=["5"]), "stop_token_ids", "token ids"),
    (body(stop_token_ids=5), "stop_token_ids", "token ids"),
    (body(stop_token_ids=[-1]), "stop_token_ids", "token ids"),
    (body(max_tokens=0), "max_tokens", "must be an integer"),
    (body(max_tokens=-1), "max_tokens", "must be an integer"),
    (body(max_completion_tokens=1.5), "max_completion_tokens", "must be an integer"),
    (body(max_completion_tokens=2**40), "max_completion_tokens", "must be an integer"),
    (body(max_tokens=5, max_completion_tokens=6), "max_tokens", "contradicts"),
    (body(max_tokens=5, max_output_tokens=5), "max_output_tokens", "give only one"),
    (body(min_tokens=-1), "min_tokens", "must be an integer"),
    (body(ignore_eos="yes"), "ignore_eos", "true or false"),
    (body(stream="yes"), "stream", "true or false"),
    (body(stream=1), "stream", "true or false"),
    (body(stream_options={"include_usage": True}), "stream_options", "needs stream=true"),
    (body(stream=True, stream_options=[]), "stream_options", "must be an object"),
    (
        body(stream=True, stream_options={"include_usage": 1}),
        "stream_options.include_usage",
        "true or false",
    ),
    (
        body(stream=True, stream_options={"continuous_usage_stats": "x"}),
        "stream_options.continuous_usage_stats",
        "true or false",
    ),
    (body(response_format={"type": "json_object"}), "response_format", "not held to a format"),
    (
        body(response_format={"type": "json_schema", "json_schema": {"name": "a"}}),
        "response_format",
        "not held to a format",
    ),
    (body(response_format={"type": "xml"}), "response_format", "must be"),
    (body(response_format="text"), "response_format", "must be"),
    (body(tools=[{"type": "function"}]), "tools", "calls no tools"),
    (body(tools="x"), "tools", "calls no tools"),
    (body(functions=[{"name": "f"}]), "functions", "calls no tools"),
    (body(tool_choice="required"), "tool_choice", "calls no tools"),
    (body(tool_choice={"type": "function"}), "tool_choice", "calls no tools"),
    (body(function_call={"name": "f"}), "function_call", "calls no tools"),
    (body(parallel_tool_calls="yes"), "parallel_tool_calls", "true or false"),
    (body(service_tier="gold"), "service_tier", "must be one of auto"),
    (body(service_tier=[]), "service_tier", "must be one of auto"),
    (body(modalities="text"), "modalities", "a list of strings"),
    (body(modalities=[1]), "modalities", "a list of strings"),
    (body(modalities=[]), "modalities", 'must hold "text"'),
    (body(modalities=["audio"]), "modalities", 'must hold "text"'),
    (body(modalities=["text", "action"]), "modalities", "text, audio, image only"),
    (body(modalities=["text", "smell"]), "modalities", "text, audio, image only"),
    (body(audio={"voice": "Ethan", "format": "wav"}), "audio", "needs modalities"),
    (body(audio="wav"), "audio", "must be"),
    (body(modalities=["text", "audio"], audio={"format": "ogg"}), "audio.format", "one of pcm16"),
    (body(modalities=["text", "audio"], audio={"format": "pcm"}), "audio.format", "one of pcm16"),
    (body(modalities=["text", "audio"], audio={"format": 3}), "audio.format", "one of pcm16"),
    (body(modalities=["text", "audio"], audio={"voice": 3}), "audio.voice", "must be a string"),
    (body(modalities=["text", "audio"], audio={"voice": {}}), "audio.voice", "must be a string"),
    (body(modalities=["text", "audio"], audio={"voice": "alloy"}), "audio.voice", "Chelsie"),
    (
        body(modalities=["text", "audio"], audio={"format": "wav"}, stream=True),
        "audio.format",
        "must be pcm16 in a stream",
    ),
    (body(chat_template_kwargs={"a": 1}), "chat_template_kwargs", "nothing of the kind"),
    (body(chat_template_kwargs=1), "chat_template_kwargs", "must be an object"),
    (body(extra_body=[]), "extra_body", "must be an object"),
    (body(temperature=1, extra_body={"temperature": 0}), "extra_body.temperature", "given twice"),
    (body(extra_body={"n": 17}), "n", "from 1 to 16"),
    (body(count=-1), "count", "at least 0"),
    (body(extra_body={"count": "x"}), "count", "must be an integer"),
    (body(timeout=0), "timeout", "seconds above 0"),
    (body(timeout="soon"), "timeout", "seconds above 0"),
]

MESSAGES = [
    (body(messages=None), "messages", "a list that is not empty"),
    (body(messages=[]), "messages", "a list that is not empty"),
    (body(messages={}), "messages", "a list that is not empty"),
    (body(messages="hello"), "messages", "a list that is not empty"),
    (body(messages=HELLO * 4097), "messages", "at most 4096"),
    (body(messages=[*HELLO, 3]), "messages[1]", '"role"'),
    (message(), "messages[0]", '"role"'),
    (message(content="x"), "messages[0]", '"role"'),
    (message(role="user"), "messages[0]", '"content"'),
    (message(role=3, content="x"), "messages[0].role", "role must be a string"),
    (message(role="robot", content="x"), "messages[0].role", "must be one of developer"),
    (message(role="function", content="x"), "messages[0].role", "must be one of developer"),
    (message(role="", content="x"), "messages[0].role", "must be one of developer"),
    (message(role="user", content=None), "messages[0].content", "a string or a list"),
    (message(role="user", content=3), "messages[0].content", "a string or a list"),
    (message(role="user", content={}), "messages[0].content", "a string or a list"),
    (message(role="user", content=[]), "messages[0].content", "at least one part"),
    (content(*[{"type": "text", "text": "x"}] * 8193), "messages", "at most 8192"),
    (message(role="user", content="a\0"), "messages[0].content", "NUL"),
    (message(role="user", content="x" * 200_001), "messages[0].content", "at most 200000"),
    (message(role="user", content="x", name=3), "messages[0].name", "must be a string"),
    (message(role="tool", content="x", tool_call_id=3), "messages[0].tool_call_id", "a string"),
    (
        message(role="assistant", content=None, tool_calls=[{"id": "a"}]),
        "messages[0].tool_calls",
        "calls no tools",
    ),
    (message(role="assistant", content=None), "messages[0].content", "a string or a list"),
    (message(role="assistant", refusal=3), "messages[0].refusal", "must be a string"),
    (message(role="assistant", audio="a"), "messages[0].audio", '{"id": ...}'),
    (message(role="assistant", audio={"id": 3}), "messages[0].audio", '{"id": ...}'),
    (message(role="assistant", audio={"id": "audio_x"}), "messages[0].audio.id", "audio_x"),
    (message(role="user", content="x", audio={"id": "a"}), "messages[0].audio", "the assistant"),
    (content("x"), FIRST, "parts are"),
    (content(3), FIRST, "parts are"),
    (content({}), FIRST, "parts are"),
    (content({"type": "text"}), FIRST, "parts are"),
    (content({"type": "text", "text": None}), FIRST, "parts are"),
    (content({"type": "text", "text": "a\0"}), f"{FIRST}.text", "NUL"),
    (content({"type": "refusal", "refusal": 3}), FIRST, "parts are"),
    (content({"type": "input_text", "text": "x"}), FIRST, "parts are"),
    (content({"type": "image", "image": "/etc/passwd"}), FIRST, "parts are"),
    (content({"type": "image_url"}), f"{FIRST}.image_url", "must be a data URL"),
    (image(3), f"{FIRST}.image_url", "must be a data URL"),
    (image(None), f"{FIRST}.image_url", "must be a data URL"),
    (image("/etc/passwd"), f"{FIRST}.image_url", "must be a data URL"),
    (image("data:image/png,abc"), f"{FIRST}.image_url", "must be base64"),
    (image("data:image/png;base64,###"), f"{FIRST}.image_url", "is not base64"),
    (image("data:image/png;base64,"), f"{FIRST}.image_url", "holds nothing"),
    (image(data_url(small_png()[:20])), f"{FIRST}.image_url", "image"),
    (image(data_url(small_wav())), f"{FIRST}.image_url", "holds audio"),
    (image(data_url(small_png()), detail="most"), f"{FIRST}.image_url.detail", "must be one of"),
    (image(data_url(small_png()), detail=1), f"{FIRST}.image_url.detail", "must be one of"),
    (sound(data=3, format="wav"), f"{FIRST}.input_audio.data", "is not base64"),
    (sound(data="###", format="wav"), f"{FIRST}.input_audio", "is not base64"),
    (sound(data="AAAA", format="midi"), f"{FIRST}.input_audio.format", "must be one of wav"),
    (sound(format="wav"), f"{FIRST}.input_audio.data", "is not base64"),
    (file(file_id="file-1"), f"{FIRST}.file.file_id", "no files are kept"),
    (file(), f"{FIRST}.file.file_data", "is not base64"),
    (file(file_data="AAAA", filename=3), f"{FIRST}.file.filename", "must be a string"),
    (file(file_data="éééé"), f"{FIRST}.file.file_data", "is not base64"),
    (file(file_data=base64.b64encode(b"hello").decode()), f"{FIRST}.file", "must hold one of"),
    (file(file_data=data_url(b"\1\2\3\4", "application/pdf")), f"{FIRST}.file", "must hold one of"),
    (
        file(file_data=data_url(small_png()), filename="a.wav"),
        f"{FIRST}.file.filename",
        "holds image",
    ),
    (
        content(*[{"type": "image_url", "image_url": data_url(b"x")}] * 257),
        "messages",
        "at most 256",
    ),
]

# Bytes of the body, status, part of the message.
BODIES = [
    (b"", 400, "not valid JSON"),
    (b"null", 400, "must be a JSON object"),
    (b"[]", 400, "must be a JSON object"),
    (b"\xff", 400, "must be UTF-8"),
    (b'{"temperature": NaN}', 400, "NaN is not a number"),
    (b'{"temperature": -Infinity}', 400, "-Infinity is not a number"),
    (b'{"temperature": 1e999}', 400, "too large a number"),
    (b'{"messages":' * 10_000 + b"1" + b"}" * 10_000, 400, "nested too deeply"),
    (b'{"messages": ' + b"[" * 50_000, 400, "nested too deeply"),
    (b'{"messages": ' + b"[" * 500_000, 413, "more than 400000 values"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
    (b'{"messages": []}', 400, "must be the name of a model"),
    (json.dumps(body(model="gpt-9")).encode(), 404, "there is tts-1, org/name, every"),
    (b" " * (2**20 + 1), 413, "longer than the 1048576 bytes"),
]


def short(case: object) -> str:
    return str(case)[:60]


def check(reply, status: int, words: str) -> dict:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    return error


@pytest.mark.parametrize(("fields", "param", "words"), [*FIELDS, *MESSAGES], ids=short)
def test_fields(site, fields, param, words):
    error = check(site.post("/v1/chat/completions", json=fields), 400, words)
    assert error["param"] == param


@pytest.mark.parametrize(("data", "status", "words"), BODIES, ids=short)
def test_bodies(site, data, status, words):
    headers = {"content-type": "application/json"}
    check(site.post("/v1/chat/completions", data=data, headers=headers), status, words)


@pytest.mark.parametrize("name", ["tools", "response_format", "min_p", "modalities"])
def test_what_the_model_cannot_honour_has_openais_code(site, name):
    values = {
        "tools": [{"type": "function"}],
        "response_format": {"type": "json_object"},
        "min_p": 0.5,
        "modalities": ["text", "smell"],
    }
    reply = site.post("/v1/chat/completions", json=body(**{name: values[name]}))
    assert check(reply, 400, "every")["code"] == "unsupported_parameter"


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_it_is_json(site, kind):
    headers = {"content-type": kind} if kind else {}
    reply = site.post("/v1/chat/completions", data=b"{}", headers=headers)
    check(reply, 400, "must be application/json")


def test_nothing_of_it_reaches_the_engine(site):
    assert not site.app.state.front.live
    assert site.engine.model.open_walks == 0
