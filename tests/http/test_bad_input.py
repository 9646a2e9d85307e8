"""What is wrong, with the status and the words that it is answered with."""

from __future__ import annotations

import json
import socket

import pytest

from tests.every_modality import PNG
from tests.http.conftest import every_site

FORM = "application/x-www-form-urlencoded"
MULTI = "multipart/form-data; boundary=b"


def kw(text: str) -> dict[str, str]:
    return {"text": "x", "model_kwargs": text}


def value(name: str, text: str) -> dict[str, str]:
    return kw(f'{{"{name}": {text}}}')


# Fields of the form, status, part of the message.
FIELDS = [
    ({}, 415, "must be multipart/form-data or urlencoded"),
    ({"text": ""}, 400, "there is neither text nor a file"),
    ({"text": "  \n"}, 400, "is empty"),
    ({"text": "a\0b"}, 400, "NUL"),
    ({"text": "x" * 200_001}, 400, "at most 200000 characters"),
    ({"text": ["a", "b"]}, 400, "must be given once"),
    ({"prompt": "x"}, 400, "'prompt': unknown field"),
    ({"text": "x", "stream": "true"}, 400, "did you mean 'streaming'?"),
    ({"text": "x", "count": "3"}, 400, "parameters go into model_kwargs"),
    ({"text": "x", "n" * 5000: "x"}, 400, "unknown field"),
    ({"text": "x", "files": "/etc/passwd"}, 400, "text goes into the field text"),
    ({"text": "x", "streaming": "maybe"}, 400, "streaming='maybe': must be true or false"),
    ({"text": "x", "streaming": ""}, 400, "must be true or false"),
    ({"text": "x", "streaming": ["true", "false"]}, 400, "streaming='twice'"),
    ({"text": "x", "output_modalities": "smell"}, 400, "output_modalities='smell'"),
    ({"text": "x", "output_modalities": "text,smell"}, 400, "must be one of text"),
    ({"text": "x", "input_modalities": "image"}, 400, "the parts are text"),
    ({"text": "x", "input_modalities": "text,smell"}, 400, "input_modalities"),
    ({"text": "x", "request_id": ""}, 400, "request_id"),
    ({"text": "x", "request_id": "a\nb"}, 400, "printable ASCII"),
    ({"text": "x", "request_id": "é"}, 400, "printable ASCII"),
    ({"text": "x", "request_id": "a" * 201}, 400, "1 to 200"),
    (kw("{"), 400, "model_kwargs is not valid JSON"),
    (kw("[]"), 400, "must be a JSON object, not list"),
    (kw("null"), 400, "must be a JSON object, not NoneType"),
    (kw("3"), 400, "not int"),
    (kw('"x"'), 400, "not str"),
    (kw("{'count': 3}"), 400, "not valid JSON"),
    (kw('{"count": 3,}'), 400, "not valid JSON"),
    (kw('{"a":' * 10_000 + "1" + "}" * 10_000), 400, "nested too deeply"),
    (kw("[" * 100_000), 400, "nested too deeply"),
    (value("count", "NaN"), 400, "NaN is not a number"),
    (value("count", "Infinity"), 400, "Infinity is not a number"),
    (value("pause", "-Infinity"), 400, "-Infinity is not a number"),
    (value("pause", "1e999"), 400, "too large a number"),
    (value("count", "9" * 5000), 400, "not valid JSON"),
    (value("count", "-1"), 400, "count=-1: must be an integer at least 0"),
    (value("count", "1.5"), 400, "count=1.5"),
    (value("count", '"3"'), 400, "count='3'"),
    (value("count", "true"), 400, "count=True"),
    (value("count", "[1]"), 400, "count=[1]"),
    (value("count", "{}"), 400, "count={}"),
    (value("pause", '"x"'), 400, "must be a number"),
    (value("pause", "-0.1"), 400, "at least 0"),
    (value("hang", "1"), 400, "hang=1: must be true or false"),
    (value("hang", '"true"'), 400, "must be true or false"),
    (value("coun", "1"), 400, "did you mean 'count'?"),
    (value("__class__", "1"), 400, "unknown parameter"),
    (value("self", "1"), 400, "unknown parameter"),
    (value("", "1"), 400, "unknown parameter"),
    (value("text", '"y"'), 400, "it has its own field"),
    (value("images", '"/etc/passwd"'), 400, "it has its own field"),
    (value("audio", '"/etc/passwd"'), 400, "it has its own field"),
    (value("video", "[]"), 400, "it has its own field"),
    (value("stream", "true"), 400, "it has its own field"),
    (value("request_id", '"a"'), 400, "it has its own field"),
    (value("output_modalities", "[]"), 400, "it has its own field"),
    (value("input_modalities", "[]"), 400, "it has its own field"),
    (value("timeout", "0"), 400, "timeout=0: must be seconds above 0"),
    (value("timeout", "-5"), 400, "must be seconds above 0"),
    (value("timeout", '"soon"'), 400, "must be seconds above 0"),
    (value("timeout", "true"), 400, "must be seconds above 0"),
    (value("timeout", "[]"), 400, "must be seconds above 0"),
    (value("timeout", "1" + "0" * 400), 400, "must be seconds above 0"),
    (value("count", '"\\ud800"'), 400, "half of a surrogate pair"),
    (value("messages", '"x"'), 400, "must be a list"),
    (value("messages", "[]"), 400, "must be a list that is not empty"),
    (value("messages", "[1]"), 400, '"role"'),
    (value("messages", '[{"role": "user"}]'), 400, '"role"'),
    (value("messages", '[{"role": 1, "content": "x"}]'), 400, "role must be a string"),
    (value("messages", '[{"role": "user", "content": 1}]'), 400, "a string or a list"),
    (value("messages", '[{"role": "user", "content": "x"}]'), 400, "either text or messages"),
]


def part(text: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": [json.loads(text)]}]})


# One part of a chat message, part of the message.
PARTS = [
    ('"x"', "parts are"),
    ('{"type": "image", "image": "/etc/passwd"}', "parts are"),
    ('{"type": "text"}', "parts are"),
    ('{"type": ["text"], "text": "x"}', "parts are"),
    ('{"type": "text", "text": 3}', "parts are"),
    ('{"type": "image_url", "image_url": {"url": "/etc/passwd"}}', "must be a data URL"),
    ('{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}', "must be a data URL"),
    ('{"type": "image_url", "image_url": "http://10.0.0.1/a.png"}', "nothing is fetched"),
    ('{"type": "image_url", "image_url": {"url": 3}}', "must be a data URL"),
    ('{"type": "image_url", "image_url": {"url": "data:image/png,x"}}', "must be base64"),
    ('{"type": "image_url", "image_url": {"url": "data:;base64,###"}}', "is not base64"),
    ('{"type": "image_url", "image_url": {"url": "data:;base64,"}}', "holds nothing"),
    ('{"type": "audio_url", "audio_url": {"url": "data:;base64,iVBORw0KGgo="}}', "holds image"),
    ('{"type": "input_audio", "input_audio": {"data": "###"}}', "is not base64"),
    ('{"type": "input_audio", "input_audio": {"data": null}}', "is not base64"),
]

# Files, status, part of the message.
FILES = [
    (("a.png", b""), 400, "the file is empty"),
    (("a.png", b"\x01\x02\x03\xff" * 10), 400, "files='image': is no image"),
    (("a.xyz", b"\x01\x02\x03\xff" * 10), 400, "its kind cannot be told"),
    (("noname", b"\x01\x02\x03\xff" * 10), 400, "its kind cannot be told"),
    (("a.wav", PNG), 400, "is named .wav (audio) but holds image"),
    (("a.png", b"fLaC...."), 400, "is named .png (image) but holds audio"),
    (("a.mp4", PNG), 400, "but holds image"),
    (("a.txt", b"hello"), 400, "text goes into the field text"),
    (("../../../etc/cron.d/x.wav", PNG), 400, "but holds image"),
    (("x" * 3000 + ".wav", PNG), 400, "but holds image"),
    (("a.png", PNG + b"0" * 2**20), 413, "longer than the 1048576 bytes"),
]

# Content type, body, status, part of the message.
BODIES = [
    ("application/json", b'{"text": "x"}', 415, "multipart/form-data or urlencoded"),
    ("text/plain", b"text=x", 415, "not text/plain"),
    ("", b"text=x", 415, "not none"),
    (FORM, b"", 400, "there is neither text nor a file"),
    (FORM, b"text=%ff%fe", 400, "must be UTF-8"),
    (FORM, b"text=\xff", 400, "must be UTF-8"),
    (FORM, b"text=%ed%a0%80", 400, "must be UTF-8"),
    (FORM, b"a=1&" * 257, 400, "more than 256 fields"),
    (FORM, b"text=" + b"x" * 2**20, 413, "longer than the 1048576 bytes"),
    ("multipart/form-data", b"--b\r\n", 400, "needs a boundary"),
    ("multipart/form-data; boundary=", b"--b\r\n", 400, "needs a boundary"),
    (f"multipart/form-data; boundary={'b' * 300}", b"", 400, "needs a boundary"),
    (MULTI, b"", 400, "the form is broken"),
    (MULTI, b"text=x", 400, "the form is broken"),
    (MULTI, b"--c\r\n", 400, "the form is broken"),
    (MULTI, b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\nx', 400, "broken"),
    (MULTI, b"--b\r\n\r\nx\r\n--b--\r\n", 400, "has no name"),
    (MULTI, b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", 400, "has no name"),
    (
        MULTI,
        b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\n\xff\r\n--b--\r\n',
        400,
        "text: must be UTF-8",
    ),
    (
        MULTI,
        b'--b\r\nContent-Disposition: form-data; name="t"\r\n\r\n\r\n' * 300 + b"--b--\r\n",
        400,
        "more than 256 parts",
    ),
    (MULTI, b"--b\r\n" + b"A: b\r\n" * 100 + b"\r\nx\r\n--b--\r\n", 400, "the form is broken"),
    (MULTI, b"--b\r\nA: " + b"b" * 10_000 + b"\r\n\r\nx\r\n--b--\r\n", 400, "the form is broken"),
]


def speech(**fields) -> bytes:
    return json.dumps({"model": "every", "input": "x", **fields}).encode()


# Body of a speech request, status, param, part of the message.
SPEECH = [
    (b"", 400, None, "not valid JSON"),
    (b"[]", 400, None, "must be a JSON object"),
    (b'"x"', 400, None, "must be a JSON object"),
    (b"{", 400, None, "not valid JSON"),
    (b"\xff", 400, None, "must be UTF-8"),
    (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400, None, "nested too deeply"),
    (b'{"input": "\\ud83d"}', 400, None, "half of a surrogate pair"),
    (b'{"speed": NaN}', 400, None, "NaN is not a number"),
    (b'{"speed": 1e400}', 400, None, "too large a number"),
    (b"{}", 400, "model", "must be the name of a model"),
    (speech(model=None), 400, "model", "must be the name"),
    (speech(model=3), 400, "model", "must be the name"),
    (speech(model=""), 400, "model", "must be the name"),
    (speech(model="gpt-4o-mini-tts"), 404, "model", "there is tts-1, org/name, every"),
    (speech(model="x" * 10_000), 404, "model", "not served here"),
    (speech(input=None), 400, "input", "must be the text to speak"),
    (speech(input=3), 400, "input", "must be the text to speak"),
    (speech(input=["a"]), 400, "input", "must be the text to speak"),
    (speech(input=""), 400, "input", "is empty"),
    (speech(input=" \t"), 400, "input", "is empty"),
    (speech(input="\0"), 400, "input", "NUL"),
    (speech(input="a\0"), 400, "input", "NUL"),
    (speech(input="x" * 200_001), 400, "input", "at most 200000"),
    (speech(voice=3), 400, "voice", "must be a string or"),
    (speech(voice=[]), 400, "voice", "must be a string or"),
    (speech(voice={}), 400, "voice", "must be a string or"),
    (speech(voice={"id": 3}), 400, "voice", "must be a string or"),
    (speech(response_format="mp4"), 400, "response_format", "must be one of mp3, opus"),
    (speech(response_format=3), 400, "response_format", "must be one of"),
    (speech(response_format=[]), 400, "response_format", "must be one of"),
    (speech(stream_format="websocket"), 400, "stream_format", "one of audio, sse"),
    (speech(stream_format={}), 400, "stream_format", "one of audio, sse"),
    (speech(speed=0), 400, "speed", "must be a number from 0.25 to 4"),
    (speech(speed=0.24), 400, "speed", "from 0.25 to 4"),
    (speech(speed=4.01), 400, "speed", "from 0.25 to 4"),
    (speech(speed=-1), 400, "speed", "from 0.25 to 4"),
    (speech(speed=10**400), 400, "speed", "from 0.25 to 4"),
    (speech(speed="1"), 400, "speed", "must be a number"),
    (speech(speed=True), 400, "speed", "must be a number"),
    (speech(speed=[1]), 400, "speed", "must be a number"),
    (speech(instructions="whisper"), 400, "instructions", "takes no instructions"),
    (speech(instructions=3), 400, "instructions", "must be a string"),
    (speech(extra_body=3), 400, "extra_body", "must be an object"),
    (speech(count=-1), 400, "count", "at least 0"),
    (speech(count="x"), 400, "count", "must be an integer"),
    (speech(extra_body={"count": 1.5}), 400, "count", "must be an integer"),
    (speech(timeout=-1), 400, "timeout", "seconds above 0"),
    (speech(timeout="soon"), 400, "timeout", "seconds above 0"),
    (speech(count=0), 500, None, "made no sound"),
    (b" " * 2**20 + b" ", 413, None, "longer than"),
]

# Method, path, status, part of the message.
PATHS = [
    ("GET", "/generate", 405, "Method Not Allowed"),
    ("PUT", "/generate", 405, "Method Not Allowed"),
    ("GET", "/", 404, "Not Found"),
    ("GET", "/../../etc/passwd", 404, "Not Found"),
    ("POST", "/health", 405, "Method Not Allowed"),
    ("GET", "/v1", 404, "Not Found"),
    ("GET", "/v1/audio/speech", 405, "Method Not Allowed"),
    ("POST", "/v1/models", 405, "Method Not Allowed"),
    ("DELETE", "/v1/models/every", 405, "Method Not Allowed"),
    ("GET", "/v1/models/..%2f..%2fetc", 404, "not served here"),
    ("GET", "/v1/models/%00", 404, "not served here"),
    ("POST", "/v1/embeddings", 404, "use POST /v1/audio/speech or POST /v1"),
    ("POST", "/v1/completions", 404, "use POST"),
    ("POST", "/v1/images/variations", 404, "use POST"),
]


def short(case: object) -> str:
    return repr(case)[:50]


def check_native(reply, status: int, message: str) -> None:
    assert reply.status_code == status, reply.text
    if status != 200:
        assert set(reply.json()) == {"detail"}
        assert message in reply.json()["detail"]


def check_openai(reply, status: int, message: str) -> dict:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    return error


@pytest.mark.parametrize(("fields", "status", "message"), FIELDS, ids=short)
def test_fields(site, fields, status, message):
    check_native(site.post(data=fields), status, message)


@pytest.mark.parametrize(("text", "message"), PARTS, ids=short)
def test_parts_of_messages(site, text, message):
    check_native(site.post(data={"model_kwargs": part(text)}), 400, message)


@pytest.mark.parametrize(("file", "status", "message"), FILES, ids=short)
def test_files(site, file, status, message):
    check_native(site.post(files={"files": file}), status, message)


@pytest.mark.parametrize(("kind", "body", "status", "message"), BODIES, ids=short)
def test_bodies(site, kind, body, status, message):
    headers = {"content-type": kind} if kind else {}
    check_native(site.post(data=body, headers=headers), status, message)


@pytest.mark.parametrize(("body", "status", "param", "message"), SPEECH, ids=short)
def test_speech(site, body, status, param, message):
    headers = {"content-type": "application/json"}
    reply = site.post("/v1/audio/speech", data=body, headers=headers)
    assert check_openai(reply, status, message)["param"] == param


@pytest.mark.parametrize("kind", ["", "text/plain", FORM, MULTI])
def test_speech_is_json(site, kind):
    headers = {"content-type": kind} if kind else {}
    reply = site.post("/v1/audio/speech", data=speech(), headers=headers)
    check_openai(reply, 400, "must be application/json")


@pytest.mark.parametrize(("method", "path", "status", "message"), PATHS, ids=short)
def test_paths(site, method, path, status, message):
    import requests

    reply = requests.request(method, site.url + path, timeout=30)
    check = check_openai if path.startswith("/v1") else check_native
    check(reply, status, message)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "1e99", ""])
def test_deadlines_in_the_header(site, value):
    reply = site.post(data={"text": "x"}, headers={"x-request-timeout": value})
    check_native(reply, 400, "x-request-timeout")


def send(site, data: bytes) -> bytes:
    """What comes back for raw bytes, after which the client says no more."""
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        return connection.recv(4096)


def test_a_body_that_stays_away_is_given_up():
    head = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n"
    head += f"Content-Type: {FORM}\r\n\r\n".encode()
    with every_site(body_timeout=0.2) as site:
        reply = send(site, head + b"text=x")
        assert b"408" in reply.split(b"\r\n")[0]
        assert b"did not come in time" in reply


def test_a_body_without_length_is_limited_too(site):
    head = b"POST /generate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    head += f"Content-Type: {FORM}\r\n\r\n".encode()
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    assert b"413" in send(site, head + chunk * 17).split(b"\r\n")[0]


def test_a_stated_length_is_refused_before_the_body_is_sent(site):
    head = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n"
    head += f"Content-Type: {FORM}\r\n\r\n".encode()
    assert b"413" in send(site, head).split(b"\r\n")[0]


def test_what_is_not_http_harms_nobody(site):
    send(site, b"\x16\x03\x01 hello\r\n\r\n")
    assert site.get("/health").status_code == 200


def test_there_are_many_cases():
    tables = (FIELDS, PARTS, FILES, BODIES, SPEECH, PATHS)
    assert sum(map(len, tables)) >= 150
