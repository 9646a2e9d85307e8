"""The README's section on HTTP does what it says: its blocks, run as they are printed.

Only the port is another. The blocks are told apart by what they talk to.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import soundfile
from PIL import Image

from mstar import Engine, MStarClient
from mstar.http import create_app
from tests.http.conftest import serving
from tests.http.test_serve import Process

ROOT = Path(__file__).parents[2]
SECTION = re.search(r"## Over HTTP\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S)[1]
TEXT = "Hello there, how are you doing today?"
HELLO = 24576  # samples that the tiny model makes of it in tara's voice, whatever the seed
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", SECTION, re.S)


def block(language: str, word: str) -> str:
    """The one block in that language that holds `word`."""
    (found,) = [code for name, code in BLOCKS if name == language and word in code]
    return found


def run(language: str, word: str, url: str, folder: Path) -> str:
    """Run a block against the server at `url`; what it prints."""
    code = block(language, word).replace("localhost:8000", url.removeprefix("http://"))
    start = ["bash", "-euo", "pipefail"] if language == "bash" else [sys.executable]
    done = subprocess.run(
        [*start, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def speech() -> Iterator[str]:
    """The URL of a server that the README's first command starts."""
    assert block("", "serve").strip() == "mstar serve orpheus-tiny"
    with Process() as process:
        yield process.url


@pytest.fixture(scope="module")
def bagel() -> Iterator[str]:
    """The URL of the model that the README's blocks on chat and images name."""
    with Engine("bagel-tiny") as engine, serving(engine, create_app(engine)) as site:
        yield site.url


def test_every_block_is_run_by_a_test():
    told = [(language, code) for language, code in BLOCKS if language]
    words = ["hello.mp3", "images/edits", " MStarClient", "openai", "AsyncMStarClient", "mount"]
    assert len(told) == len(words)
    assert all(any(word in code for _, code in told) for word in words)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_on_the_native_route_and_on_openais(speech, tmp_path):
    run("bash", "hello.mp3", speech, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "hello.ndjson").read_text().splitlines()]
    assert {line["modality"] for line in lines} == {"audio"}
    sound = b"".join(base64.b64decode(line["data"]) for line in lines)
    usage = lines[-1]["metadata"]["usage"]
    assert len(sound) == round(usage["audio_seconds"] * 24000) * 2 == 2 * HELLO
    mp3 = soundfile.info(tmp_path / "hello.mp3")
    assert (mp3.format, mp3.samplerate) == ("MP3", 24000)
    assert mp3.duration == pytest.approx(HELLO / 24000, abs=0.1)


def test_our_own_client(speech, tmp_path):
    printed = run("python", " MStarClient", speech, tmp_path).splitlines()
    assert soundfile.info(tmp_path / "hello.wav").frames == HELLO
    assert len(printed) > 3
    assert printed[-1] == "0 stop"


def test_openai_python(speech, tmp_path):
    pytest.importorskip("openai")
    run("python", "openai", speech, tmp_path)
    samples, rate = soundfile.read(tmp_path / "openai.wav")
    assert (len(samples), rate) == (HELLO, 24000)


def test_the_async_client(speech, tmp_path):
    pytest.importorskip("httpx")
    printed = run("python", "AsyncMStarClient", speech, tmp_path).splitlines()
    assert sum(map(int, printed)) == HELLO
    alone = MStarClient(speech).tts(TEXT, voice="tara", seed=1)
    assert (tmp_path / "tara.wav").read_bytes() == alone.to_wav()


@pytest.mark.skipif(
    not all(map(shutil.which, ("curl", "jq", "base64"))), reason="needs curl, jq and base64"
)
def test_curl_on_chat_and_images(bagel, tmp_path):
    completion = json.loads(run("bash", "images/edits", bagel, tmp_path))
    assert completion["choices"][0]["message"]["content"]
    assert Image.open(tmp_path / "cat.png").size == (128, 128)
    (edited,) = json.loads((tmp_path / "blue.json").read_text())["data"]
    assert Image.open(io.BytesIO(base64.b64decode(edited["b64_json"]))).size == (128, 128)


def test_the_app_inside_another(tmp_path):
    (tmp_path / "program.py").write_text(block("python", "mount"))
    command = [sys.executable, "-m", "uvicorn", "program:app", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as server:
        try:
            found = (re.search(r"running on (\S+)", line) for line in server.stderr)
            url = next(match[1] for match in found if match)
            assert requests.get(f"{url}/speech/ready", timeout=5).json() == {"status": "ready"}
            assert MStarClient(f"{url}/speech").tts(TEXT, voice="tara").seconds > 1
            body = {"model": "orpheus-tiny", "input": TEXT, "voice": "tara"}
            reply = requests.post(f"{url}/speech/v1/audio/speech", json=body, timeout=30)
            assert reply.headers["content-type"] == "audio/mpeg"
        finally:
            server.kill()


def test_the_options_are_those_of_the_command():
    mentioned = set(re.findall(r"`(--[\w-]+)`", SECTION)) - {"--help"}
    assert len(mentioned) >= 8
    command = [sys.executable, "-m", "mstar.cli", "serve", "--help"]
    wide = {"COLUMNS": "200", "TERM": "dumb", "PATH": ""}
    shown = subprocess.run(command, capture_output=True, text=True, env=wide, timeout=60).stdout
    assert mentioned <= set(re.findall(r"--[\w-]+", shown))


def test_what_is_refused_has_the_statuses_that_are_told(bagel):
    def status(**fields: object) -> int:
        body = {"model": "bagel", "messages": [{"role": "user", "content": "hi"}], **fields}
        return requests.post(f"{bagel}/v1/chat/completions", json=body, timeout=30).status_code

    def with_image(url: str) -> list[dict[str, object]]:
        part = {"type": "image_url", "image_url": {"url": url}}
        return [{"role": "user", "content": [part]}]

    assert status() == 200
    assert status(temperature=3) == 400
    assert status(tools=[{"type": "function", "function": {"name": "f"}}]) == 400
    assert status(model="another") == 404
    assert status(messages=with_image("https://example.org/cat.png")) == 400
    assert status(messages=with_image("file:///etc/hostname")) == 400
    assert requests.post(f"{bagel}/v1/embeddings", json={}, timeout=5).status_code == 404
    for path in ("/health", "/ready", "/version", "/metrics", "/docs", "/openapi.json"):
        assert requests.get(f"{bagel}{path}", timeout=5).status_code == 200
