"""The command line: what it refuses, what it writes, and where."""

import errno
import io
import json
import os
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
from mstar.commands import generate, terminal
from mstar.errors import InvalidRequest, RequestFailed, RequestTimeout
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
    end = "stop"

    def __init__(self, model, **options):
        self.model, self.options, self.closed, self.request = model, options, False, None
        type(self).made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closed = True

    def submit(self, **request):
        self.request = request
        return self

    request_id = "req-1"
    cancelled = False

    def cancel(self):
        self.cancelled = True

    def __iter__(self):
        for kind in self.request["output_modalities"]:
            yield from MADE[kind] * (self.images if kind == "image" else 1)
        if self.fails is not None:
            raise self.fails
        yield Event(finish_reason=self.end, usage=Usage(prompt_tokens=3, generated_tokens=5))


def put_in_registry(monkeypatch, name, load):
    plugin = types.SimpleNamespace(name=name, value=f"{name}:CARD", load=load)
    monkeypatch.setattr(registry, "entry_points", lambda group: [plugin])


@pytest.fixture
def engine(monkeypatch):
    """The stub in the place of `mstar.local.Engine`, and the toy in the registry."""

    class Engine(StubEngine):
        made = []  # noqa: RUF012  (a fresh list per test)

    put_in_registry(monkeypatch, "toy", lambda: TOY)
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
    assert refused(run("generate", "toy", stdin=""), "error: prompt: nothing to work on")
    for empty in ("", " \n"):
        assert refused(run("generate", "toy", empty), "nothing to work on")
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
    assert data["request_id"] == "req-1"


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


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.wav", "WAV"), ("a.FLAC", "FLAC"), ("a.ogg", "OGG"), ("a.opus", "OGG"), ("a.mp3", "MP3")],
)
def test_audio_is_written_as_the_extension_says(engine, folder, name, form):
    result = run("generate", "toy", "x", "-o", name)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"wrote {name}\n")
    assert engine.made[0].request["output_modalities"] == ("audio",)
    assert engine.made[0].request["stream"] is False
    info = soundfile.info(name)
    assert (info.format, info.samplerate, info.frames) == (form, 24000, 4000)


def test_further_images_are_numbered(engine, folder):
    engine.images = 3
    Path("a-2.png").write_text("mine")
    result = run("generate", "toy", "x", "-o", "a.png")
    assert result.stderr == "wrote a.png\nwrote a-3.png\nwrote a-4.png\n"
    assert Path("a-2.png").read_text() == "mine"


def test_several_files_hold_what_their_extensions_say(engine, folder):
    outs = ["-o", "a.npz", "-o", "a.txt", "-o", "a.json", "-o", "a.png"]
    result = run("generate", "toy", "x", "-m", ",".join(TOY.outputs), *outs)
    assert (result.exit_code, result.stdout) == (0, "")
    assert np.load("a.npz")["actions"].shape == (2, 3)
    assert Path("a.txt").read_text(encoding="utf-8") == "grüße"
    assert json.loads(Path("a.json").read_text())["request_id"] == "req-1"
    assert Path("a.png").read_bytes() == png("red")


def test_text_streams_beside_an_audio_file(engine, folder):
    result = run("generate", "toy", "x", "-m", "text,audio", "-o", "a.wav")
    assert result.stdout == "grüße\n"
    assert Path("a.wav").exists()


def test_audio_can_be_piped(engine):
    whole = run("generate", "toy", "x", "-m", "audio", "-o", "-").stdout_bytes
    with wave.open(io.BytesIO(whole)) as file:
        assert (file.getframerate(), file.getnframes()) == (24000, 4000)
    assert engine.made[0].request["stream"] is False
    live = run("generate", "toy", "x", "-m", "audio", "-o", "-", "--stream").stdout_bytes
    assert engine.made[1].request["stream"] is True
    assert live[44:] == whole[44:]
    assert live[4:8] == live[40:44] == b"\xff" * 4


def test_what_else_is_made_can_be_piped(engine):
    assert run("generate", "toy", "x", "-o", "-").stdout == "grüße\n"
    assert run("generate", "toy", "x", "-m", "image", "-o", "-").stdout_bytes == png("red")
    array = np.load(io.BytesIO(run("generate", "toy", "x", "-m", "action", "-o", "-").stdout_bytes))
    assert array.shape == (2, 3)


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
    assert result.stderr == "error: --out='a.wav': exists already; --force overwrites it\n"
    assert [p.name for p in folder.iterdir()] == ["a.wav"]
    assert Path("a.wav").read_text() == "theirs"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-m", "audio"], ["--out: audio needs a file", "-o - to send WAV bytes"]),
        (["-m", "smell"], ["--modality='smell'", "text, image, audio"]),
        (["-m", "text,"], ["--modality=''"]),
        (["--attach", "a.png"], ["--attach='a.png'", "No such file"]),
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
    monkeypatch.setattr(terminal, "is_tty", lambda stream: True)
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
    assert engine.made[0].cancelled
    assert engine.made[0].closed


def test_a_closed_stdin_or_stdout_is_one_line(engine, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(generate, "sys", types.SimpleNamespace(stdin=None, stdout=sys.stdout))
        with pytest.raises(InvalidRequest, match="nothing to work on"):
            generate._inputs(TOY, None, [])
        patch.setattr(terminal, "sys", types.SimpleNamespace(stdin=None, stdout=None))
        with pytest.raises(OSError, match="standard output is closed"):
            terminal.write("x")


def test_an_error_of_the_system_names_the_file(engine):
    engine.fails = OSError(errno.ENOSPC, "No space left on device", "some/file")
    result = run("generate", "toy", "x")
    assert (result.exit_code, result.stderr) == (1, "error: some/file: No space left on device\n")


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


def test_sound_without_samples_is_a_wav_and_a_warning(engine, folder, monkeypatch):
    monkeypatch.setitem(MADE, "audio", [AudioChunk(pcm(0), 24000)])
    result = run("generate", "toy", "x", "-o", "a.wav")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "wrote a.wav\nwarning: no sound (finish_reason=stop)\n"
    assert soundfile.info("a.wav").frames == 0
    result = run("generate", "toy", "x", "-o", "a.mp3")
    assert result.exit_code == 1
    assert result.stderr == "error: the model made no audio (finish_reason=stop)\n"


def test_an_answer_that_was_cut_off_is_a_warning(engine, monkeypatch):
    monkeypatch.setitem(MADE, "text", [TextChunk("gr")])
    engine.end = "length"
    result = run("generate", "toy", "x")
    assert (result.exit_code, result.stdout) == (0, "gr\n")
    assert result.stderr == "warning: cut off at the longest output allowed\n"


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
    put_in_registry(monkeypatch, "bad", lambda: 1 / 0)
    result = run("models")
    assert "orpheus" in result.stdout
    assert result.stderr.count("warning: the plug-in for 'bad'") == 1


# the program


def test_the_version():
    assert run("--version").stdout == f"mstar {mstar.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ["--version"],
        ["--help"],
        ["generate", "--help"],
        ["bench", "--help"],
        ["models"],
        ["models", "orpheus"],
    ],
)
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
    request_id = "req-1"
    def __init__(self, model, **options): pass
    def __enter__(self): return self
    def __exit__(self, *exc): print("closed", file=sys.stderr)
    def submit(self, **request): return self
    def cancel(self): print("cancelled", file=sys.stderr)
    def __iter__(self):
        print("started", file=sys.stderr, flush=True)
        threading.Event().wait(60)
        yield
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
    def submit(self, **request): return self
    def cancel(self): pass
    request_id = "req-1"
    def __iter__(self):
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


def test_a_bar_on_the_terminal_leaves_the_pipe_alone(tmp_path):
    code = """
import sys, types
import numpy as np
from mstar.types import AudioChunk
class Engine:
    request_id = "req-1"
    def __init__(self, model, **options): pass
    def __enter__(self): return self
    def __exit__(self, *exc): pass
    def submit(self, **request): return self
    def cancel(self): pass
    def __iter__(self):
        yield AudioChunk(np.zeros(24000, np.int16), 24000)
        assert sys.stdout is sys.__stdout__
sys.modules["mstar.local"] = types.SimpleNamespace(Engine=Engine)
sys.argv = ["mstar", "generate", "orpheus-tiny", "hi", "-o", "-", "--stream"]
from mstar.cli import main
main()
"""
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, timeout=60, check=True)
    os.close(theirs)
    assert b"generating" in os.read(ours, 1 << 16)
    os.close(ours)
    assert len(done.stdout) == 44 + 48000


# end to end

TEXT = "Hello there, how are you doing today?"
GREEDY = ["-s", "temperature=0", "-s", "repetition_penalty=1", "-s", "codec_noise=off"]
FOR_EVER = ["-s", "ignore_eos=true", "-s", "max_output_tokens=50000"]


def mstar_command(*args):
    return [sys.executable, "-m", "mstar.cli", "generate", "orpheus-tiny", *args]


def speak(*args, cwd, **kwargs):
    command = mstar_command(*args, *GREEDY)
    done = subprocess.run(command, cwd=cwd, capture_output=True, timeout=120, **kwargs)
    assert done.returncode == 0, done.stderr.decode()
    return done


def test_orpheus_tiny_speaks(tmp_path):
    done = speak(TEXT, "-o", "x.wav", "--json", cwd=tmp_path)
    info = soundfile.info(tmp_path / "x.wav")
    assert (info.frames, info.samplerate, info.channels) == (24576, 24000, 1)
    assert info.subtype == "PCM_16"
    data = json.loads(done.stdout)
    assert data["finish_reason"] == "stop"
    assert data["files"] == ["x.wav"]
    assert data["usage"]["audio_seconds"] == pytest.approx(1.024)
    assert done.stderr == b""


def test_orpheus_tiny_speaks_the_same_live_and_whole_through_a_pipe(tmp_path):
    live = speak("-m", "audio", "-o", "-", "--stream", cwd=tmp_path, input=TEXT.encode() + b"\n")
    whole = speak("-o", "-", cwd=tmp_path, input=TEXT.encode())
    assert live.stderr == whole.stderr == b""
    assert len(live.stdout) == len(whole.stdout) == 44 + 2 * 24576
    samples = [np.frombuffer(done.stdout[44:], "<i2").astype(int) for done in (live, whole)]
    assert np.abs(samples[0] - samples[1]).max() <= 1


def test_ctrl_c_ends_a_long_speech(tmp_path):
    command = mstar_command(TEXT, "-o", "-", "--stream", *FOR_EVER)
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe)
    process.stdout.read(44 + 4096)  # it is speaking now
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"interrupted\n")


def test_a_listener_who_leaves_ends_the_speech(tmp_path):
    command = mstar_command(TEXT, "-o", "-", "--stream", *FOR_EVER)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe) as process:
        process.stdout.read(44 + 4096)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1
