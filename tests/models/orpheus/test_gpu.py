"""Orpheus on a GPU: the same tokens as on the CPU, captured and not, looking ahead and not."""

import json
from pathlib import Path

import numpy as np
import pytest

from mstar import Engine

pytestmark = pytest.mark.gpu

DATA = Path(__file__).parents[2] / "data" / "orpheus"
CASES = json.loads((DATA / "goldens.json").read_text())["cases"]
GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "codec_noise": "off"}


def speak(engine: Engine, **more) -> list[np.ndarray]:
    requests = [{"text": c["text"], "voice": c["voice"] or "", **more} for c in CASES]
    return [result.audio.pcm for result in engine.generate_batch(requests)]


@pytest.fixture(scope="module")
def on_cpu():
    with Engine("orpheus-tiny", device="cpu") as engine:
        return speak(engine, **GREEDY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("warmup", [False, True])
def test_greedy_speech_is_that_of_the_cpu(on_cpu, dtype, look_ahead, warmup):
    options = {"dtype": dtype, "look_ahead": look_ahead, "warmup": warmup}
    with Engine("orpheus-tiny", device="cuda", **options) as engine:
        for got, want in zip(speak(engine, **GREEDY), on_cpu, strict=True):
            assert len(got) == len(want)  # the tokens are exact: the margins are large
            assert np.abs(got.astype(int) - want).max() <= 8
        assert engine.stats()["nodes"]["lm"]["pages"]["used"] == 0


def test_a_seed_gives_the_same_speech_alone_and_in_a_batch():
    with Engine("orpheus-tiny", device="cuda") as engine:
        together = speak(engine, seed=5)
        for case, pcm in zip(CASES, together, strict=True):
            alone = engine.generate(text=case["text"], voice=case["voice"] or "", seed=5)
            assert len(alone.audio.pcm) == len(pcm)


def test_a_preempted_request_goes_on_where_it_was():
    with Engine("orpheus-tiny", device="cuda", kv_tokens=512) as engine:
        lengths = [len(pcm) for pcm in speak(engine, **GREEDY, max_output_tokens=300)]
        assert lengths == [case["samples"] for case in CASES]
        assert engine.stats()["nodes"]["lm"]["pages"]["preemptions"] > 0
