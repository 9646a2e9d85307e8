"""The vocabulary that Engine and the HTTP clients share, and the clients on the wire.

The server here is a script: it keeps what it was sent, and plays back what the test wrote down.
"""

import asyncio
import base64
import contextlib
import email.policy
import gc
import inspect
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from mstar import client
from mstar.client import (
    AsyncMStarClient,
    AudioBuffer,
    EngineClosed,
    EngineOverloaded,
    GenerateMethods,
    GenerateResult,
    InvalidRequest,
    ModelNotFound,
    MStarClient,
    RequestFailed,
    RequestTimeout,
    TextChunk,
)
from tests.test_import import BLOCKED


class Recorder(GenerateMethods):
    """Remembers what reaches `generate`."""

    def __init__(self, result=None):
        self.result, self.calls = result or GenerateResult(), []

    def generate(self, *, output_modalities=("text",), stream=False, **kwargs):
        self.calls.append({"output_modalities": output_modalities, "stream": stream, **kwargs})
        return iter([TextChunk("a"), TextChunk("b")]) if stream else self.result


def test_chat_is_generate_with_a_prompt():
    engine = Recorder(GenerateResult(text="hello"))
    assert engine.chat("hi", images=b"png", audio=None, temperature=0.5, seed=None).text == "hello"
    assert engine.calls == [
        {
            "text": "hi",
            "images": b"png",
            "temperature": 0.5,
            "output_modalities": ("text",),
            "stream": False,
        }
    ]


def test_chat_can_stream():
    assert [event.text for event in Recorder().chat("hi", stream=True)] == ["a", "b"]


def test_tts_returns_the_sound():
    sound = AudioBuffer(np.zeros(4, np.int16), 24000)
    engine = Recorder(GenerateResult(audio=sound))
    assert engine.tts("hi", voice="leo") is sound
    assert engine.tts("hi", top_p=None) is sound
    first, second = engine.calls
    assert first["output_modalities"] == ("audio",)
    assert first["voice"] == "leo"
    assert "voice" not in second
    assert "top_p" not in second


def test_generate_image_returns_png_bytes():
    engine = Recorder(GenerateResult(images=[b"one", b"two"]))
    assert engine.generate_image("a cat", steps=3) == b"one"
    assert engine.calls[0]["output_modalities"] == ("image",)
    assert engine.calls[0]["steps"] == 3


def test_no_image_and_no_sound_are_errors():
    engine = Recorder(GenerateResult(finish_reason="length"))
    with pytest.raises(RequestFailed, match="length"):
        engine.generate_image("a cat")
    with pytest.raises(RequestFailed, match="no sound"):
        engine.tts("hi")


def test_stream_is_generate_with_events():
    engine = Recorder()
    assert len(list(engine.stream(text="hi", images=None))) == 2
    assert engine.calls == [{"output_modalities": ("text",), "stream": True, "text": "hi"}]


def test_results_events_and_errors_are_at_hand():
    import mstar.errors
    import mstar.types

    for module in (mstar.types, mstar.errors):
        for name in set(module.__all__) - {"fold", "nearest"}:
            assert getattr(client, name) is getattr(module, name)


# -- a scripted server -----------------------------------------------------------------------------


class Script(ThreadingHTTPServer):
    """Answers every request with `status`, `headers` and the pieces of `body`.

    A piece is bytes to send, a number of seconds to pause, or `None` to cut the connection.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.calls, self.gone, self.connections = [], threading.Event(), 0
        self.over = threading.Event()
        self.says(document())

    def says(self, *body, status=200, chunked=True, **headers):
        self.status, self.body, self.chunked = status, body, chunked
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def form(self):
        return self.calls[-1]

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.connections += 1

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
        message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
        call = {"files": [], "headers": self.headers, "path": self.path}
        for part in message.iter_parts():
            name = part.get_param("name", header="content-disposition")
            content = part.get_payload(decode=True)
            if name == "files":
                call["files"].append((part.get_filename(), part.get_content_type(), content))
            else:
                assert name not in call
                call[name] = content.decode()
        self.server.calls.append(call)
        self.reply()

    def reply(self):
        script = self.server
        self.send_response(script.status)
        for name, value in script.headers.items():
            self.send_header(name, value)
        if script.chunked:
            self.send_header("transfer-encoding", "chunked")
        else:
            self.close_connection = True
            self.send_header("connection", "close")
        self.end_headers()
        try:
            for piece in script.body:
                if piece is None:
                    self.close_connection = True
                    return
                if not isinstance(piece, bytes):
                    script.over.wait(piece)
                else:
                    self.piece(piece)
            if script.chunked:
                self.wfile.write(b"0\r\n\r\n")
        except OSError:
            script.gone.set()
            self.close_connection = True

    def piece(self, data):
        head = b"%x\r\n" % len(data) if self.server.chunked else b""
        self.wfile.write(head + data + (b"\r\n" if head else b""))
        self.wfile.flush()


@pytest.fixture
def script():
    with Script() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.over.set()
        server.shutdown()


def line(modality, data=b"", **metadata):
    data = base64.b64encode(data).decode()
    return json.dumps({"modality": modality, "data": data, "metadata": metadata}).encode() + b"\n"


def document(**outputs):
    entries = {
        modality: [{"data": base64.b64encode(data).decode(), "metadata": {}} for data in items]
        for modality, items in outputs.items()
    }
    return json.dumps({"request_id": "theirs", "outputs": entries}).encode()


@pytest.fixture(params=["sync", "async"])
def ask(request, script):
    """Call a method of either client; of a stream, all events."""
    if request.param == "async":
        pytest.importorskip("httpx")

    def sync(method, *args, options, **kwargs):
        with MStarClient(**options) as remote:
            answer = getattr(remote, method)(*args, **kwargs)
            return list(answer) if inspect.isgenerator(answer) else answer

    async def asynchronous(method, *args, options, **kwargs):
        async with AsyncMStarClient(**options) as remote:
            answer = await getattr(remote, method)(*args, **kwargs)
            return [event async for event in answer] if hasattr(answer, "__aiter__") else answer

    def ask(method, *args, options=None, **kwargs):
        options = {"base_url": script.url, "timeout": 20, **(options or {})}
        if request.param == "sync":
            return sync(method, *args, options=options, **kwargs)
        return asyncio.run(asynchronous(method, *args, options=options, **kwargs))

    return ask


# -- what goes out ---------------------------------------------------------------------------------


def test_the_form_holds_what_was_said_and_nothing_else(ask, script):
    ask(
        "generate",
        text='hé\r\n"x"\n',
        output_modalities=("text", "audio"),
        request_id="mine",
        voice=None,
        temperature=np.float32(0.5),
        steps=np.int64(3),
        flag=np.bool_(True),
        state=np.arange(4, dtype=np.float32).reshape(2, 2),
        nested={"a": (1, None)},
    )
    form = script.form
    assert form.pop("path") == "/generate"
    headers = form.pop("headers")
    assert "authorization" not in headers
    assert "x-request-timeout" not in headers
    assert json.loads(form.pop("model_kwargs")) == {
        "temperature": 0.5,
        "steps": 3,
        "flag": True,
        "state": [[0, 1], [2, 3]],
        "nested": {"a": [1, None]},
    }
    assert form == {
        "files": [],
        "text": 'hé\r\n"x"\n',
        "output_modalities": "text,audio",
        "streaming": "false",
        "request_id": "mine",
    }


def test_what_was_not_given_is_not_sent(ask, script):
    ask("generate", text="hi", images=None, seed=None)
    assert set(script.form) == {"files", "path", "headers", "text", "streaming"}
    ask("generate", text="hi", output_modalities="audio")
    assert script.form["output_modalities"] == "audio"


def test_media_is_a_path_bytes_or_a_name_with_bytes(ask, script, tmp_path):
    (tmp_path / "Bild ü.JPG").write_bytes(b"jpeg")
    (tmp_path / "noname").write_bytes(b"fLaC")
    png = b"\x89PNG\r\n\x1a\n\0\xff"
    images = [tmp_path / "Bild ü.JPG", png, ("a.webp", bytearray(b"webp")), b"GIF89a"]
    ask("generate", images=images, audio=str(tmp_path / "noname"), video=memoryview(b"film"))
    assert script.form["files"] == [
        ("Bild ü.JPG", "image/jpeg", b"jpeg"),
        ("image1.png", "image/png", png),
        ("a.webp", "image/webp", b"webp"),
        ("image3.gif", "image/gif", b"GIF89a"),
        ("noname.flac", script.form["files"][4][1], b"fLaC"),
        ("video0.mp4", "video/mp4", b"film"),
    ]
    assert script.form["input_modalities"] == "image,image,image,image,audio,video"
    assert "text" not in script.form


def test_several_kinds_of_parts_are_put_in_order(ask, script):
    ask("chat", "what?", images=[b"a", b"b"])
    assert script.form["input_modalities"] == "image,image,text"
    ask("generate", images=[b"a", b"b"])
    assert "input_modalities" not in script.form
    order = ("audio", "image", "text", "audio", "image")
    ask("generate", text="t", images=[b"i1", b"i2"], audio=[b"a1", b"a2"], input_modalities=order)
    assert script.form["input_modalities"] == ",".join(order)
    assert [content for _, _, content in script.form["files"]] == [b"a1", b"i1", b"a2", b"i2"]


def test_media_in_chat_messages_travel_as_data_urls(ask, script):
    parts = [{"type": "image", "image": b"\x89PNG"}, {"type": "text", "text": "what?"}]
    ask("generate", messages=[{"role": "user", "content": parts}])
    assert json.loads(script.form["model_kwargs"])["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
        {"type": "text", "text": "what?"},
    ]


def test_files_among_the_parameters_travel_as_data_urls(ask, script, tmp_path):
    (tmp_path / "goal.png").write_bytes(b"\x89PNG")
    image = "data:image/png;base64,iVBORw=="
    goals = {"a": tmp_path / "goal.png", "b": ("x.png", b"\x89PNG"), "c": [b"\x89PNG"]}
    ask("generate", text="hi", **goals)
    unnamed = image.replace("image/png", "application/octet-stream")
    assert json.loads(script.form["model_kwargs"]) == {"a": image, "b": image, "c": [unnamed]}


def test_the_key_and_the_deadline_travel_in_headers(ask, script):
    options = {"api_key": "secret", "base_url": script.url + "/under/"}
    ask("generate", text="hi", timeout=12.5, options=options)
    assert script.form["headers"]["authorization"] == "Bearer secret"
    assert script.form["headers"]["x-request-timeout"] == "12.5"
    assert script.form["path"] == "/under/generate"
    assert "model_kwargs" not in script.form


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "text"),
        ({"text": 3}, "text"),
        ({"text": "\ud800"}, "text"),
        ({"images": "no/such.png"}, "images"),
        ({"images": 5}, "images"),
        ({"audio": (np.zeros(3), 24000)}, "audio"),
        ({"video": [None]}, "video"),
        ({"text": "x", "request_id": ""}, "request_id"),
        ({"text": "x", "timeout": 0}, "timeout"),
        ({"text": "x", "timeout": float("nan")}, "timeout"),
        ({"text": "x", "timeout": "5"}, "timeout"),
        ({"text": "x", "output_modalities": ()}, "output_modalities"),
        ({"text": "x", "input_modalities": 5}, "input_modalities"),
        ({"text": "x", "temperature": float("inf")}, "temperature"),
        ({"text": "x", "noise": np.array([1, np.nan])}, "noise"),
        ({"text": "x", "data": object()}, "data"),
        ({"text": "x", "goal": Path("no/such.png")}, "goal"),
    ],
)
def test_what_cannot_be_sent_is_refused_here(ask, script, given, field):
    with pytest.raises(InvalidRequest) as caught:
        ask("generate", **given)
    assert caught.value.field == field
    assert script.calls == []


@pytest.mark.parametrize("kind", [MStarClient, AsyncMStarClient])
def test_bad_arguments_of_a_client_are_named(kind):
    pytest.importorskip("httpx")
    for given in ({"base_url": "host:80"}, {"timeout": -1}, {"api_key": "a\nb"}):
        (field,) = given
        with pytest.raises(InvalidRequest) as caught:
            kind(**given)
        assert caught.value.field == field


# -- what comes back -------------------------------------------------------------------------------


def test_a_result_from_a_server_without_metadata(ask, script):
    numbers = np.array([1.5, 2.5], "<f4").tobytes()
    pcm = np.array([1, -1], "<i2").tobytes()
    script.says(
        document(text=[b"a", b"b"], image=[b"png"], audio=[pcm], action=[numbers], video=[numbers])
    )
    result = ask("generate", text="hi")
    assert (result.text, result.images, result.request_id) == ("ab", [b"png"], "theirs")
    assert (result.audio.sample_rate, result.audio.pcm.tolist()) == (24000, [1, -1])
    assert result.actions.tolist() == result.latents[0].tolist() == [1.5, 2.5]
    assert result.finish_reason is result.usage is None


def test_the_shorthands_give_what_they_say(ask, script):
    script.says(document(audio=[b"\1\0"], image=[b"png"], text=[b"hello"]))
    assert ask("chat", "hi", temperature=0.5).text == "hello"
    assert script.form["output_modalities"] == "text"
    assert ask("generate_image", "a cat") == b"png"
    assert script.form["output_modalities"] == "image"
    assert ask("tts", "hi", voice="leo").pcm.tolist() == [1]
    assert json.loads(script.form["model_kwargs"]) == {"voice": "leo"}
    script.says(document())
    with pytest.raises(RequestFailed, match="no image"):
        ask("generate_image", "a cat")
    with pytest.raises(RequestFailed, match="no sound"):
        ask("tts", "hi")


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("method", ["stream", "generate", "chat"])
def test_a_stream_cut_at_bad_places(ask, script, method, chunked):
    text, body = "añ🙂", b""
    for byte in text.encode():
        body += line("text", bytes([byte]))
    body += line("audio", b"\1\0", sample_rate=16000) + line("text", b"", finish_reason="stop")
    script.says(*(body[i : i + 5] for i in range(0, len(body), 5)), chunked=chunked)
    kwargs = {} if method == "stream" else {"stream": True}
    events = ask(method, *(["hi"] if method == "chat" else []), **kwargs, **TEXT[method])
    assert [event.text for event in events[:3]] == list(text)
    assert (events[3].pcm.tolist(), events[3].sample_rate) == ([1], 16000)
    assert (events[4].text, events[4].finish_reason) == ("", "stop")
    assert script.form["streaming"] == "true"


TEXT = {"stream": {"text": "hi"}, "generate": {"text": "hi"}, "chat": {}}


@pytest.mark.parametrize("chunked", [True, False])
def test_events_come_as_they_are_made(script, chunked):
    script.says(line("text", b"now"), 30, line("text", b"later"), chunked=chunked)
    began = time.monotonic()
    with MStarClient(script.url) as remote:
        assert next(remote.stream(text="hi")).text == "now"
    assert time.monotonic() - began < 10


def test_async_events_come_as_they_are_made_and_without_await(script):
    pytest.importorskip("httpx")
    script.says(line("text", b"now"), 30, line("text", b"later"))

    async def first():
        async with AsyncMStarClient(script.url) as remote:
            async for event in remote.stream(text="hi"):
                return event.text

    began = time.monotonic()
    assert asyncio.run(first()) == "now"
    assert time.monotonic() - began < 10


# -- leaving early ---------------------------------------------------------------------------------

ENDLESS = [piece for _ in range(4000) for piece in (line("text", b"x" * 1000), 0.005)]


@pytest.mark.parametrize("how", ["close", "drop", "break"])
def test_leaving_a_stream_early_closes_the_connection(script, how):
    script.says(*ENDLESS)
    remote = MStarClient(script.url)
    if how == "break":
        for _ in remote.stream(text="hi"):
            break
    else:
        events = remote.stream(text="hi")
        next(events)
        if how == "close":
            events.close()
            assert list(events) == []
        del events
    gc.collect()
    assert script.gone.wait(10)


@pytest.mark.parametrize("how", ["close", "break", "unread", "cancel"])
def test_leaving_an_async_stream_early_closes_the_connection(script, how):
    pytest.importorskip("httpx")
    script.says(*ENDLESS)

    async def leave():
        remote = AsyncMStarClient(script.url)
        if how == "break":
            async for _ in remote.stream(text="hi"):
                break
        elif how == "close":
            events = remote.stream(text="hi")
            await anext(events)
            await events.aclose()
        elif how == "unread":
            await remote.generate(text="hi", stream=True)
        else:
            task = asyncio.create_task(remote.generate(text="hi"))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.3)
        gc.collect()
        assert await asyncio.to_thread(script.gone.wait, 10)
        await remote.close()

    asyncio.run(leave())


def test_a_connection_serves_again_after_a_whole_reply(script):
    with MStarClient(script.url) as remote:
        for _ in range(3):
            script.says(document(text=[b"a"]))
            remote.chat("hi")
            script.says(line("text", b"a"))
            list(remote.stream(text="hi"))
            script.says(b'{"detail": "no"}', status=400)
            with pytest.raises(InvalidRequest):
                remote.chat("hi")
    assert script.connections == 1


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (404, ModelNotFound),
        (409, InvalidRequest),
        (429, EngineOverloaded),
        (503, EngineOverloaded),
        (504, RequestTimeout),
        (500, RequestFailed),
    ],
)
def test_a_refusal_has_the_servers_words(ask, script, status, kind, stream):
    script.says(b'{"detail": "temperature=9: too much"}', status=status, retry_after="2")
    with pytest.raises(kind) as caught:
        ask("generate", text="hi", stream=stream)
    assert (str(caught.value), caught.value.status) == ("temperature=9: too much", status)
    if kind is EngineOverloaded:
        assert caught.value.retry_after == 2
    if kind is InvalidRequest:
        assert caught.value.field == "temperature"
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_refusal_is_raised_before_the_first_event(script):
    script.says(b'{"detail": "no"}', status=400)
    with MStarClient(script.url) as remote, pytest.raises(InvalidRequest, match="no"):
        remote.stream(text="hi")


def test_a_draining_server_is_a_closed_engine(ask, script):
    script.says(b'{"detail": "the server is draining"}', status=503)
    with pytest.raises(EngineClosed, match="draining"):
        ask("generate", text="hi")


def test_errors_of_something_else_than_mstar_name_the_url(ask, script):
    script.says(b"<html>oops</html>", status=502)
    with pytest.raises(RequestFailed, match=f"{script.url}/generate answered 502 Bad Gateway"):
        ask("generate", text="hi")
    script.says(b'{"detail":"Not Found"}', status=404)
    with pytest.raises(ModelNotFound, match=f"{script.url}/generate answered 404 Not Found$"):
        ask("generate", text="hi")
    script.says(b"", status=307, location="http://other/")
    with pytest.raises(RequestFailed, match="redirected to http://other/"):
        ask("generate", text="hi")
    script.says(b"<html>welcome</html>")
    with pytest.raises(RequestFailed, match="sent something other than a JSON object"):
        ask("generate", text="hi")


def test_an_error_in_the_middle_of_a_stream(ask, script):
    script.says(line("text", b"so far"), line("error", "große Not".encode(), status=500))
    with pytest.raises(RequestFailed, match="große Not"):
        ask("stream", text="hi")
    script.says(line("text", b"so far"), line("error", b"x=1: must be 2", status=400))
    with pytest.raises(InvalidRequest, match="must be 2"):
        ask("stream", text="hi")


def test_a_reply_that_is_cut_off_is_not_complete(ask, script):
    script.says(line("text", b"so far"), None)
    with pytest.raises(RequestFailed, match=f"the connection to {script.url}/generate broke off"):
        ask("stream", text="hi")
    script.says(document(text=[b"so far"])[:40], None)
    with pytest.raises(RequestFailed, match="broke off"):
        ask("generate", text="hi")
    script.says(line("text", b"so far"), chunked=False, x_mstar_version="1")
    with pytest.raises(RequestFailed, match="ended before its last line"):
        ask("stream", text="hi")


def test_nothing_is_lost_if_the_connection_is_cut_after_the_last_line(ask, script):
    script.says(line("text", b"all", finish_reason="stop"), None)
    assert [event.text for event in ask("stream", text="hi")] == ["all"]


def test_nobody_there(ask):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for method, given in (("generate", {"text": "hi"}), ("health", {})):
            with pytest.raises(EngineClosed, match=f"cannot reach {url}/{method}"):
                ask(method, options={"base_url": url}, **given)


@pytest.mark.parametrize("pieces", [[5], [line("text", b"so far"), 5]])
def test_silence_ends_in_a_timeout(ask, script, pieces):
    script.says(*pieces)
    with pytest.raises(RequestTimeout, match=f"{script.url}/generate was silent for 0.2 s"):
        ask("stream", text="hi", options={"timeout": 0.2})


def test_a_deadline_holds_for_the_whole_request(ask, script):
    script.says(*[piece for _ in range(100) for piece in (line("text", b"a"), 0.05)])
    began = time.monotonic()
    with pytest.raises(RequestTimeout, match=r"not done within 0\.4 s") as caught:
        ask("stream", text="hi", timeout=0.4)
    assert time.monotonic() - began < 3
    assert set(caught.value.partial.text) == {"a"}
    script.says(5, document())
    with pytest.raises(RequestTimeout, match=r"not done within 0\.2 s"):
        ask("generate", text="hi", timeout=0.2)


def test_health(ask, script):
    script.says(b'{"status": "healthy"}')
    assert ask("health") == {"status": "healthy"}
    script.says(b'{"detail": "loading"}', status=503)
    with pytest.raises(EngineClosed, match="loading"):
        ask("health")
    script.says(b'{"status": "unhealthy"}')
    with pytest.raises(EngineClosed, match="unhealthy"):
        ask("health")


# -- one vocabulary, light to import ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["generate", "chat", "generate_image", "tts", "stream", "health", "close"]
)
def test_engine_and_clients_take_the_same_arguments(name):
    from mstar.local import Engine

    here = inspect.signature(getattr(Engine, name))
    assert inspect.signature(getattr(MStarClient, name)) == here
    there = inspect.signature(getattr(AsyncMStarClient, name))
    assert list(there.parameters.values()) == list(here.parameters.values())


def test_the_client_works_without_torch_and_transformers(script):
    script.says(document(text=[b"hello"]))
    code = (
        f"{BLOCKED}\nfrom mstar import MStarClient\n"
        f"print(MStarClient({script.url!r}).chat('hi', images=b'png', x=1).text)\n"
        "import mstar.client\nprint('httpx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["hello", "False"], done.stderr


def test_a_missing_httpx_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ImportError, match=r"pip install 'mstar\[async\]'"):
        AsyncMStarClient()
