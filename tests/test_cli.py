"""The command line: what it refuses, what it writes, and where."""

import io
import json
import signal
import subprocess
import sys
import types
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner

import mstar
from mstar import cli
from mstar.errors import RequestFailed, RequestTimeout
from mstar.models import registry
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters
from mstar.types import (
    ActionChunk,
    AudioChunk,
    Event,
    ImageChunk,
    LatentChunk,
    TextChunk,
    Usage,
    fold,
)

TOY = ModelCard(
    name="toy",
    title="A toy",
    entry="nowhere:Nothing",
    inputs=("text", "image"),
    outputs=("text", "image", "audio", "action", "latent"),
    parameters=Parameters(
        "toy", [Parameter("steps", int, 4, low=1), Parameter("tags", str, nullable=True)]
    ),
    repos={"net": "someone/toy", "head": "someone/head"},
)


def png(color):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(out, "PNG")
    return out.getvalue()


def pcm(n):
    return np.arange(n, dtype=np.int16)


MADE = {
    "text": [TextChunk("grü"), TextChunk("ße")],
    "image": [ImageChunk(png("red"))],
    "audio": [AudioChunk(pcm(3000), 24000), AudioChunk(pcm(1000), 24000)],
    "action": [ActionChunk(np.ones((2, 3), np.float32))],
    "latent": [LatentChunk(np.zeros((1, 2), np.float32))],
}


class StubEngine:
    """Says what it was asked, and makes a little of every modality."""

    made: list["StubEngine"]
    fails: BaseException | None = None
    images = 1

    def __init__(self, model, **options):
        self.model, self.options, self.closed, self.request = model, options, False, None
        type(self).made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closed = True

    def generate(self, *, stream=False, **request):
        self.request = {**request, "stream": stream}
        return self._events() if stream else fold(self._events(), request["request_id"])

    def _events(self):
        for kind in self.request["output_modalities"]:
            yield from MADE[kind] * (self.images if kind == "image" else 1)
        if self.fails is not None:
            raise self.fails
        yield Event(finish_reason="stop", usage=Usage(prompt_tokens=3, generated_tokens=5))


@pytest.fixture
def engine(monkeypatch):
    """The stub in the place of `mstar.local.Engine`, and the toy in the registry."""

    class Engine(StubEngine):
        made = []  # noqa: RUF012  (a fresh list per test)

    plugin = types.SimpleNamespace(name="toy", value="toy:CARD", load=lambda: TOY)
    monkeypatch.setattr(registry, "entry_points", lambda group: [plugin])
    monkeypatch.setitem(sys.modules, "mstar.local", types.SimpleNamespace(Engine=Engine))
    return Engine


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args, stdin=None):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], input=stdin)


def refused(result, *words):
    """The run was refused with exit code 2 and one line on stderr, before a model was loaded."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for word in ("error: ", *words):
        assert word in result.stderr
    return True


# text


def test_text_goes_to_stdout_and_nothing_else_does(engine):
    result = run("generate", "toy", "hello", "-s", "steps=2")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "grüße\n", "")
    (made,) = engine.made
    assert made.closed
    assert made.model == "toy"
    assert made.options == {"weights": None, "device": None, "dtype": None, "load_format": "auto"}
    assert made.request.pop("request_id")
    assert made.request == {
        "text": "hello",
        "steps": 2,
        "output_modalities": ("text",),
        "stream": True,
    }


def test_no_stream_prints_the_same_at_the_end(engine):
    assert run("generate", "toy", "hello", "--no-stream").stdout == "grüße\n"
    assert engine.made[0].request["stream"] is False


@pytest.mark.parametrize("args", [[], ["-"]])
def test_the_prompt_can_be_piped(engine, args):
    assert run("generate", "toy", *args, stdin="from a pipe\n").exit_code == 0
    assert engine.made[0].request["text"] == "from a pipe"


def test_no_prompt_at_all_is_refused(engine):
    assert refused(run("generate", "toy", stdin=""), "prompt", "nothing to work on")
    assert refused(run("generate", "toy", stdin=b"\xff\xfe"), "stdin", "UTF-8")
    assert engine.made == []


def test_options_reach_the_engine(engine, tmp_path):
    (tmp_path / "net").mkdir()
    args = ["--device", "cpu", "--dtype", "float32", "--load-format", "dummy"]
    run("generate", "toy", "x", *args, "--weights", f"net={tmp_path / 'net'}")
    run("generate", "toy", "x", "--weights", tmp_path)
    first, second = engine.made
    assert first.options == {
        "weights": {"net": str(tmp_path / "net")},
        "device": "cpu",
        "dtype": "float32",
        "load_format": "dummy",
    }
    assert second.options["weights"] == str(tmp_path)


def test_json_is_one_object_on_stdout(engine, folder):
    result = run("generate", "toy", "x", "-m", "text,audio", "-o", "a.wav", "--json")
    data = json.loads(result.stdout)
    assert (data["text"], data["finish_reason"], data["files"]) == ("grüße", "stop", ["a.wav"])
    assert data["usage"]["generated_tokens"] == 5
    assert data["request_id"] == engine.made[0].request["request_id"]


# attachments


def test_attachments_are_told_by_content(engine, folder):
    Path("photo").write_bytes(png("red"))
    Path("notes.txt").write_text("some notes")
    assert run("generate", "toy", "look", "-a", "photo", "-a", "notes.txt").exit_code == 0
    request = engine.made[0].request
    assert request["images"] == [("photo", png("red"))]
    assert request["text"] == "look\n\nsome notes"


def test_attachments_that_do_not_fit_are_refused(engine, folder):
    soundfile.write("a.wav", pcm(10), 24000)
    Path("b.wav").write_bytes(png("red"))
    assert refused(run("generate", "toy", "x", "-a", "a.wav"), "holds audio", "text, image")
    assert refused(run("generate", "toy", "x", "-a", "b.wav"), "b.wav", "but holds image")
    assert refused(run("generate", "toy", "x", "-a", "none.png"), "none.png", "No such file")
    assert engine.made == []


# output files


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_audio_is_written_as_the_extension_says(engine, folder, kind):
    result = run("generate", "toy", "x", "-o", f"a.{kind}")
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"wrote a.{kind}" in result.stderr
    assert engine.made[0].request["output_modalities"] == ("audio",)
    info = soundfile.info(f"a.{kind}")
    assert (info.format, info.samplerate, info.channels) == (kind.upper(), 24000, 1)
    if kind in ("wav", "flac"):
        samples, _ = soundfile.read(f"a.{kind}", dtype="int16")
        assert np.array_equal(samples, np.concatenate([pcm(3000), pcm(1000)]))


def test_images_are_written_and_further_ones_are_numbered(engine, folder):
    engine.images = 3
    Path("a-2.png").write_text("mine")
    assert "a.png" in run("generate", "toy", "x", "-o", "a.png").stderr
    assert Path("a.png").read_bytes() == Path("a-4.png").read_bytes() == png("red")
    assert Path("a-2.png").read_text() == "mine"
    run("generate", "toy", "x", "-o", "b.jpg")
    assert Image.open("b.jpg").format == "JPEG"


def test_arrays_text_and_everything_can_be_written(engine, folder):
    assert run("generate", "toy", "x", "-m", "action", "-o", "a.npy").exit_code == 0
    assert np.load("a.npy").shape == (2, 3)
    assert run("generate", "toy", "x", "-m", "action,latent,audio", "-o", "a.npz").exit_code == 0
    arrays = np.load("a.npz")
    assert set(arrays) == {"actions", "latents_0", "audio", "sample_rate"}
    assert run("generate", "toy", "x", "-o", "a.txt").stdout == ""
    assert Path("a.txt").read_text(encoding="utf-8") == "grüße"
    kinds = ",".join(TOY.outputs)
    assert run("generate", "toy", "x", "-m", kinds, "-o", "a.json").exit_code == 0
    data = json.loads(Path("a.json").read_text())
    assert data["actions"] == [[1, 1, 1], [1, 1, 1]]
    assert data["text"] == "grüße"
    assert data["audio"]["sample_rate"] == 24000
    assert len(data["images"]) == len(data["latents"]) == 1


def test_text_streams_beside_an_audio_file(engine, folder):
    result = run("generate", "toy", "x", "-m", "text,audio", "-o", "a.wav")
    assert result.stdout == "grüße\n"
    assert Path("a.wav").exists()


def test_audio_can_be_piped(engine):
    whole = run("generate", "toy", "x", "-m", "audio", "-o", "-").stdout_bytes
    with wave.open(io.BytesIO(whole)) as file:
        assert (file.getframerate(), file.getnframes()) == (24000, 4000)
    live = run("generate", "toy", "x", "-m", "audio", "-o", "-", "--stream").stdout_bytes
    assert live[44:] == whole[44:]
    assert live[4:8] == live[40:44] == b"\xff" * 4


def test_a_file_that_exists_is_kept_unless_forced(engine, folder):
    Path("a.wav").write_text("mine")
    assert refused(run("generate", "toy", "x", "-o", "a.wav"), "a.wav", "--force")
    assert engine.made == []
    assert Path("a.wav").read_text() == "mine"
    assert run("generate", "toy", "x", "-o", "a.wav", "--force").exit_code == 0
    assert soundfile.info("a.wav").frames == 4000


def test_a_file_that_appears_meanwhile_is_kept(engine, folder):
    engine.__exit__ = lambda self, *exc: Path("a.wav").write_text("theirs")
    result = run("generate", "toy", "x", "-o", "a.wav")
    assert result.exit_code == 2
    assert "exists now" in result.stderr
    assert [p.name for p in folder.iterdir()] == ["a.wav"]
    assert Path("a.wav").read_text() == "theirs"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-m", "audio"], ["audio needs a file", "-o - to send WAV bytes"]),
        (["-m", "smell"], ["modality='smell'", "text, image, audio"]),
        (["-o", "a.doc"], ["a.doc", ".wav"]),
        (["-o", "a"], ["extension"]),
        (["-o", "no/such/a.wav"], ["no folder no/such"]),
        (["-m", "text", "-o", "a.wav"], ["cannot hold text"]),
        (["-o", "a.wav", "-o", "a.wav"], ["given twice"]),
        (["-m", "text,audio", "-o", "-"], ["one modality"]),
        (["-m", "audio", "-o", "-", "--json"], ["--json"]),
        (["-s", "steps"], ["key=value"]),
        (["-s", "step=3"], ["unknown parameter of toy", "did you mean 'steps'"]),
        (["-s", "steps=0"], ["steps=0", "at least 1"]),
        (["-s", "steps=2.5"], ["steps='2.5'"]),
        (["-s", "steps=2", "-s", "steps=3"], ["given twice"]),
        (["--weights", "nix=."], ["parts net, head"]),
        (["--weights", "net=.", "--weights", "."], ["part=place"]),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(engine, folder, args, words):
    assert refused(run("generate", "toy", "x", *args), *words)
    assert engine.made == []


def test_audio_is_not_thrown_at_a_terminal(engine, monkeypatch):
    monkeypatch.setattr(cli, "_is_tty", lambda stream: True)
    assert refused(run("generate", "toy", "x", "-m", "audio", "-o", "-"), "terminal")


def test_an_unknown_model_is_refused(engine):
    assert refused(run("generate", "orfeus", "x"), "did you mean 'orpheus'", "known names")


# failures


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestFailed("the net fell over"), 1),
        (RequestTimeout("too late"), 1),
        (OSError("disk gone"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_failure_is_one_line_and_leaves_no_file(engine, folder, error, code):
    engine.fails = error
    result = run("generate", "toy", "x", "-o", "a.wav")
    assert result.exit_code == code
    assert result.stderr.count("\n") == 1
    assert (str(error) or "interrupted") in result.stderr
    assert list(folder.iterdir()) == []
    assert engine.made[0].closed


def test_debug_shows_the_traceback(engine):
    engine.fails = RequestFailed("the net fell over")
    result = run("generate", "toy", "x", "--debug")
    assert "Traceback" in result.stderr
    assert result.exit_code == 1


def test_an_answer_without_the_thing_asked_for_is_a_failure(engine, folder, monkeypatch):
    monkeypatch.setitem(MADE, "audio", [])
    result = run("generate", "toy", "x", "-o", "a.wav")
    assert result.exit_code == 1
    assert "made no audio (finish_reason=stop)" in result.stderr
    assert list(folder.iterdir()) == []


# models


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and a function that puts a repository into it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def add(repo):
        home = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("abc")
        (home / "snapshots" / "abc").mkdir(parents=True)
        (home / "snapshots" / "abc" / "config.json").write_text("{}")

    return add


def test_models_lists_names_flows_defaults_and_weights(cache):
    result = run("models")
    assert result.exit_code == 0
    for words in ("orpheus ", "text -> audio", "not downloaded", "shipped", "temperature=0.6"):
        assert words in result.stdout


def test_models_as_json(cache):
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}
    assert rows["orpheus"]["outputs"] == ["audio"]
    assert rows["orpheus-tiny"]["weights"] == "shipped"
    assert rows["orpheus"]["parameters"][0]["name"] == "voice"


def test_models_says_what_is_in_the_cache(cache):
    def weights():
        return json.loads(run("models", "orpheus", "--json").stdout)["weights"]

    assert weights() == "not downloaded"
    cache("hubertsiuzdak/snac_24khz")
    assert weights() == "partly cached (snac)"
    cache("canopylabs/orpheus-3b-0.1-ft")
    assert weights() == "cached"


def test_models_shows_all_about_one(cache):
    text = run("models", "orpheus-tiny").stdout
    assert "one of tara, leah" in text
    assert "max_new_tokens" in text
    assert "shipped" in text
    assert refused(run("models", "orfeus"), "did you mean 'orpheus'")


def test_a_broken_plug_in_is_a_warning_line(cache, monkeypatch):
    plugin = types.SimpleNamespace(name="bad", value="bad:CARD", load=lambda: 1 / 0)
    monkeypatch.setattr(registry, "entry_points", lambda group: [plugin])
    result = run("models")
    assert "orpheus" in result.stdout
    assert result.stderr.count("warning: the plug-in for 'bad'") == 1


# the program


def test_the_version():
    assert run("--version").stdout == f"mstar {mstar.__version__}\n"


@pytest.mark.parametrize("args", [["--version"], ["--help"], ["models"]])
def test_what_runs_no_model_needs_neither_torch_nor_transformers(args):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from mstar.cli import main; main()"
    )
    subprocess.run([sys.executable, "-c", code, *args], check=True, stdout=subprocess.DEVNULL)


def test_ctrl_c_cancels_and_exits_with_130(tmp_path):
    code = f"""
import sys, threading, types
class Engine:
    def __init__(self, model, **options): pass
    def __enter__(self): return self
    def __exit__(self, *exc): print("closed", file=sys.stderr)
    def generate(self, **request):
        try:
            print("started", file=sys.stderr, flush=True)
            threading.Event().wait(60)
            yield
        finally:
            print("cancelled", file=sys.stderr)
sys.modules["mstar.local"] = types.SimpleNamespace(Engine=Engine)
sys.argv = ["mstar", "generate", "orpheus-tiny", "hi", "-o", {str(tmp_path / "a.wav")!r}]
from mstar.cli import main
main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.split("\n") == ["cancelled", "closed", "interrupted", ""]
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_traceback():
    code = """
import sys, types
from mstar.types import TextChunk
from mstar.models.orpheus.card import CARD
object.__setattr__(CARD, "outputs", ("text",))
object.__setattr__(CARD, "default_output", ("text",))
class Engine:
    def __init__(self, model, **options): pass
    def __enter__(self): return self
    def __exit__(self, *exc): pass
    def generate(self, **request):
        while True:
            yield TextChunk("a" * 1000)
sys.modules["mstar.local"] = types.SimpleNamespace(Engine=Engine)
sys.argv = ["mstar", "generate", "orpheus-tiny", "hi"]
from mstar.cli import main
main()
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(20) == 1
    process.stderr.close()


# end to end


def mstar_command(*args, cwd, **kwargs):
    command = [sys.executable, "-m", "mstar.cli", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, timeout=120, **kwargs)


def test_orpheus_tiny_speaks(tmp_path):
    text = "Hello there, how are you doing today?"
    options = ["-o", "x.wav", "-s", "temperature=0", "--json"]
    done = mstar_command("generate", "orpheus-tiny", text, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    info = soundfile.info(tmp_path / "x.wav")
    assert (info.frames, info.samplerate, info.channels) == (24576, 24000, 1)
    data = json.loads(done.stdout)
    assert data["finish_reason"] == "stop"
    assert data["files"] == ["x.wav"]
    assert data["usage"]["audio_seconds"] == pytest.approx(1.024)


def test_orpheus_tiny_speaks_into_a_pipe(tmp_path):
    text = b"Hello there, how are you doing today?\n"
    options = ["-m", "audio", "-o", "-", "-s", "temperature=0", "--stream"]
    done = mstar_command("generate", "orpheus-tiny", *options, cwd=tmp_path, input=text)
    assert done.returncode == 0, done.stderr.decode()
    assert len(done.stdout) == 44 + 2 * 24576
