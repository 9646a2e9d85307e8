"""Our own server under `mstar bench`, and how true the times are that it tells."""

import sys

import pytest

from benchmarks import bench_accuracy
from mstar import Engine
from mstar.bench.load import Load
from mstar.bench.measure import percentile
from mstar.bench.prompts import Attachment, Prompt
from mstar.bench.report import summary
from mstar.bench.routes import Ask
from mstar.bench.run import Plan, run
from mstar.http import create_app
from tests.every_modality import picture
from tests.http.conftest import serving

GREEDY = {"temperature": 0, "repetition_penalty": 1, "codec_noise": "off"}
TEXT = "Hello there, how are you doing today?"


def bench(site, route, *, text="word", requests=4, concurrency=2, seed=None, **ask):
    load = Load(concurrency, requests=requests)
    prompts = [Prompt(text)] if text else []
    plan = Plan(site.url, load, route, Ask(**ask), prompts, warmup=1, seed=seed)
    found = summary(run(plan))
    assert found["failures"] == []
    assert found["requests"]["done"] == requests
    return found


# the native route


def test_text_over_the_native_route(site):
    found = bench(site, "generate", modalities=("text",), extra={"count": 5, "pause": 0.02})
    assert found["tokens"] == {"prompt": 16, "generated": 20, "source": "usage"}
    assert found["latency"]["itl"]["count"] == 16
    assert found["latency"]["itl"]["p50"] == pytest.approx(0.02, abs=0.015)
    assert found["latency"]["first_audio"] is None


def test_everything_over_the_native_route(site):
    kinds = ("text", "audio", "image", "action", "latent")
    image = Attachment("a.png", picture(16, 16, 3), "image")
    found = bench(site, "generate", modalities=kinds, attached=(image,), extra={"count": 2})
    assert found["images"] == 8
    assert found["audio_seconds"] == pytest.approx(4 * 2 * 0.01)
    assert found["latency"]["ttft"]["count"] == 4


# orpheus


def test_speech(speaker):
    found = bench(speaker, "auto", text=TEXT, voice="tara", extra=GREEDY)
    assert (found["route"], found["model"]) == ("speech", "tts-1")
    assert found["audio_seconds"] == pytest.approx(4 * 1.024)
    assert found["latency"]["rtf"]["count"] == 4


def test_speech_as_events(speaker):
    found = bench(speaker, "speech", text=TEXT, sse=True, extra=GREEDY)
    assert found["audio_seconds"] == pytest.approx(4 * 1.024)
    assert found["tokens"]["source"] == "usage"


def test_speech_over_the_native_route(speaker):
    found = bench(speaker, "generate", text=TEXT, voice="tara", extra=GREEDY)
    assert found["audio_seconds"] == pytest.approx(4 * 1.024)
    assert found["tokens"]["generated"] > 0


# chat and images


def test_chat(site):
    found = bench(site, "auto", extra={"count": 5})
    assert (found["route"], found["model"] in ("every", "tts-1")) == ("chat", True)
    assert found["tokens"]["generated"] == 20
    assert found["tokens"]["source"] == "usage"
    assert found["latency"]["ttft"]["count"] == 4


def test_sound_in_a_chat(site):
    found = bench(site, "chat", modalities=("text", "audio"), extra={"count": 5})
    assert found["latency"]["first_audio"]["count"] == 4
    assert found["audio_seconds"] == pytest.approx(4 * 5 * 0.01)


@pytest.mark.parametrize("sse", [False, True])
def test_images(site, sse):
    size = {"size": "64x64"}
    found = bench(site, "images", text="a harbour", sse=sse, extra=size)
    assert found["images"] == 4
    image = Attachment("a.png", picture(16, 16, 3), "image")
    found = bench(site, "images", text="at night", sse=sse, extra=size, attached=(image,))
    assert found["images"] == 4


# the truth


@pytest.mark.skipif(sys.platform == "win32", reason="needs one clock for two processes")
def test_the_times_are_true():
    pace = bench_accuracy.Pace(pieces=15)
    found, _ = bench_accuracy.errors(pace, streams=8, rounds=2)
    assert len(found["TTFT"]) == 16
    assert len(found["ITL"]) == 16 * 14
    for errors in found.values():
        assert percentile(sorted(abs(error) for error in errors), 50) < 0.002


@pytest.mark.parametrize("seed", [None, 5])
def test_the_built_in_sentences_are_such_as_the_tiny_model_speaks(seed):
    with Engine("orpheus-tiny") as engine, serving(engine, create_app(engine)) as site:
        found = bench(site, "auto", text=None, requests=6, seed=seed)
    assert found["audio_seconds"] == pytest.approx(2 * (24576 + 34816 + 81920) / 24000)
