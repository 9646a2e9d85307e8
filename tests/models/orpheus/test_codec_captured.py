"""The codec's windows as captured steps, with a recorder that runs them instead of a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mstar import Engine
from mstar.engine.captured_batches import CapturedBatches
from mstar.models.orpheus.codec import Codec, CodecJob
from tests.recording import replays, strict_replays

DATA = Path(__file__).parents[2] / "data" / "orpheus"
CASES = json.loads((DATA / "goldens.json").read_text())["cases"]
CONTEXT = 3
CODES = torch.randint(4096, (40, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def engine():
    with Engine("orpheus-tiny", device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def codecs(engine):
    """As it is, and captured for up to four windows."""
    snac = engine.model.networks[1]
    with torch.inference_mode():
        captured = Codec(snac, torch.device("cpu"), strict_replays)
        captured.capture(1, 4)
        captured.capture(2, 4)
    assert len(captured.batches) == 2 * 2 * 3
    return Codec(snac, torch.device("cpu")), captured


def windows(count, chunk=1, seed=None, first=CONTEXT, **more):
    """Of one utterance or of several that are at different places, with full context."""
    jobs = []
    for low in range(first - CONTEXT, first - CONTEXT + 2 * count, 2):
        high = low + chunk + 2 * CONTEXT
        keep = (CONTEXT, CONTEXT + chunk)
        jobs.append(CodecJob(CODES[low:high].flatten().tolist(), low, high, seed, keep, **more))
    return jobs


@torch.inference_mode()
def same(codecs, jobs):
    plain, captured = (codec.run(jobs) for codec in codecs)
    return all(map(np.array_equal, plain, captured)) and len(plain) == len(captured)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_captured_batch_sounds_the_same_to_the_bit(codecs, count, seed):
    for chunk in (1, 2):
        assert same(codecs, windows(4, chunk, seed, first=20))  # what the next one is padded with
        assert same(codecs, windows(count, chunk, seed, fade_in=True, fade_out=True))
    assert len(codecs[1].batches) == 12


def test_other_windows_run_as_they_are(codecs):
    short = CodecJob(CODES[:5].flatten().tolist(), 0, 5, 1, (0, 1))
    shifted = [CodecJob(job.codes, job.low, job.high, 1, (2, 3)) for job in windows(2)]
    for jobs in ([short], shifted, windows(5), windows(1, chunk=3)):
        assert same(codecs, jobs)
    assert len(codecs[1].batches) == 12


def test_nothing_is_captured_after_the_warm_up(engine):
    """And speech is what it is without."""
    greedy = {"temperature": 0, "repetition_penalty": 1.0, "seed": 1}
    asked = [{"text": c["text"], "voice": c["voice"], **greedy} for c in CASES[:3]]

    def speak():
        together = [result.audio.pcm for result in engine.generate_batch(asked)]
        handles = [engine.submit(**each) for each in asked]
        return together + [handle.result().audio.pcm for handle in handles]

    decoder, plain, noted = engine.model.decoder, speak(), []

    def record(step):
        replay, outputs = replays(step)

        def noting():
            noted.append(outputs[0].shape)
            replay()

        return noting, outputs

    before, decoder.batches = decoder.batches, CapturedBatches(record)
    try:
        assert not len(decoder.batches)
        engine.warmup()
        count = len(decoder.batches)
        assert count == 2 * (3 + 7)  # with noise and without: 1, 2, 4 and 1, 2, ..., 64 windows
        assert not noted
        assert all(map(np.array_equal, plain, speak()))
        engine.warmup()
    finally:
        found, decoder.batches = decoder.batches, before
    assert len(found) == count
    assert noted
