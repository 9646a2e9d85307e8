"""Chunks of the vocoder as captured steps, with a recorder that runs them instead of a GPU."""

from __future__ import annotations

import copy
from itertools import islice

import numpy as np
import pytest
import torch

from mstar import Engine
from mstar.engine.captured import record
from mstar.engine.captured_batches import CapturedBatches
from mstar.models.qwen3_omni.runners import VocoderJob, VocoderRunner, chunk_sizes
from tests.recording import replays, strict_replays


@pytest.fixture(scope="module")
def captured(loop):
    with torch.inference_mode():
        runner = VocoderRunner(loop.vocoder, strict_replays)
        runner.capture(4)
    assert len(runner.batches) == 3 + 3 + 3 + 3 + 2  # batches of 1, 2, 4 but 64 frames at most
    return runner


def codes_of(loop, streams, frames):
    groups, size = loop.vocoder.config.num_quantizers, loop.vocoder.config.codebook_size
    draw = torch.Generator().manual_seed(streams)
    return torch.randint(size, (streams, frames, groups), generator=draw)


def heard(runner, vocoder, codes, sizes):
    """Samples `[streams, samples]`, and the streams."""
    streams, found, start = [vocoder.stream() for _ in codes], [], 0
    for size in sizes:
        part = codes[:, start : start + size]
        jobs = [VocoderJob(s, list(c)) for s, c in zip(streams, part, strict=True)]
        found.append(np.stack(runner.run(jobs)))
        start += size
    return np.concatenate(found, 1).astype(int), streams


@pytest.mark.parametrize("count", [1, 2])
def test_a_captured_stream_sounds_the_same_to_the_bit(captured, loop, count):
    sizes = [*islice(chunk_sizes(), 6), 3]  # the last chunk is as long as what is left
    assert sizes == [2, 4, 8, 16, 32, 32, 3]
    codes, known = codes_of(loop, count, sum(sizes)), len(captured.batches)
    plain, streams = heard(VocoderRunner(loop.vocoder), loop.vocoder, codes, sizes)
    found, others = heard(captured, loop.vocoder, codes, sizes)
    assert np.array_equal(found, plain)
    for one, other in zip(streams, others, strict=True):
        assert one.frames == other.frames == sum(sizes)
        for name in ("keys", "values", "rows"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert len(captured.batches) == known


def test_padding_is_not_heard(captured, loop):
    codes, sizes = codes_of(loop, 4, 14), [2, 4, 8]
    heard(captured, loop.vocoder, codes.flip(0, 1), sizes)  # what three streams are padded with
    found, _ = heard(captured, loop.vocoder, codes[:3], sizes)
    for row, alone in zip(found, codes, strict=False):
        plain, _ = heard(VocoderRunner(loop.vocoder), loop.vocoder, alone[None], sizes)
        assert np.abs(row - plain[0]).max() <= 1


def test_streams_that_do_not_come_in_the_usual_chunks_run_as_they_are(captured, loop):
    codes, sizes, known = codes_of(loop, 1, 12), [3, 9], len(captured.batches)
    plain, _ = heard(VocoderRunner(loop.vocoder), loop.vocoder, codes, sizes)
    found, _ = heard(captured, loop.vocoder, codes, sizes)
    assert np.array_equal(found, plain)
    assert len(captured.batches) == known


def test_a_chunk_that_failed_can_be_made_again(loop, monkeypatch):
    """A stream is changed at the end, so that smaller batches can be tried."""
    runner, codes = VocoderRunner(loop.vocoder), codes_of(loop, 2, 6)
    plain, streams = heard(runner, loop.vocoder, codes, [2])
    jobs = [VocoderJob(s, list(c)) for s, c in zip(streams, codes[:, 2:], strict=True)]

    def fails(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(loop.vocoder.synthesis, "forward", fails)
        with pytest.raises(MemoryError):
            runner.run(jobs)
    found = np.concatenate([plain, np.stack(runner.run(jobs))], 1)
    assert np.array_equal(found, heard(runner, loop.vocoder, codes, [2, 4])[0])


@pytest.mark.gpu
def test_a_captured_stream_on_a_gpu_sounds_as_on_a_cpu(loop):
    codes, sizes = codes_of(loop, 3, 65), [2, 4, 8, 16, 32, 3]
    expected, _ = heard(VocoderRunner(loop.vocoder), loop.vocoder, codes, sizes)
    vocoder = copy.deepcopy(loop.vocoder).cuda()
    runner = VocoderRunner(vocoder, record())
    runner.capture(4)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            found, _ = heard(runner, vocoder, codes.cuda(), sizes)
            assert np.abs(found - expected).max() <= 8


def test_nothing_is_captured_after_the_warm_up():
    """And speech is what it is without."""
    asked = {"text": "Hello.", "seed": 0, "ignore_eos": True, "max_output_tokens": 8}
    asked.update(talker_min_tokens=20, talker_max_tokens=20, output_modalities=("text", "audio"))
    with Engine("qwen3_omni-tiny", device="cpu") as engine:
        plain = engine.generate(**asked).audio.pcm
        engine.model.sounds.batches = batches = CapturedBatches(replays)
        assert np.array_equal(engine.generate(**asked).audio.pcm, plain)
        assert len(batches) == 0  # nor before it
        engine.warmup()
        assert len(batches) == 5 + 5 + 4 + 3 + 2
        assert np.array_equal(engine.generate(**asked).audio.pcm, plain)
        assert len(batches) == 19
