"""Frames as one captured step: what it says is what the parts say that run one after the other."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from qwen_asking import SPOKEN, assert_golden, assert_same_sound, request_of

from mstar import Engine
from mstar.engine import graphs
from mstar.engine.kernels.paged_batch import PagedBatch
from mstar.engine.kvcache import KVGroup
from mstar.engine.layers.attention import Projected
from mstar.engine.paged_context import PagedContext
from mstar.engine.sampler import DeviceSampler
from mstar.engine.sampling import SamplingParams
from mstar.engine.spans import Span, Step, Tokens
from mstar.errors import RequestFailed
from mstar.models.qwen3_omni import frames as frames_module
from mstar.models.qwen3_omni.frames import FrameJob, Frames
from tests.recording import replays, strict_replays
from tests.waiting import until

SMALL = {"token_budget": 9, "kv_tokens": 192}  # prompts come in chunks, beside others' frames
TEXT = "It goes up."
OPTIONS = [
    {"talker_min_tokens": 9, "talker_max_tokens": 9},
    {"talker_temperature": 0.0, "talker_max_tokens": 12, "talker_repetition_penalty": 4.0},
    {"talker_temperature": 0.0, "code_predictor_temperature": 0.7, "talker_max_tokens": 7},
    {"talker_top_k": 3, "code_predictor_top_k": 5, "talker_max_tokens": 14},
    {"talker_repetition_penalty": 1.0, "talker_min_p": 0.1, "talker_min_tokens": 7},
    {"talker_top_p": 0.6, "code_predictor_top_p": 0.5, "talker_max_tokens": 11},
]


class HostContext:
    """A captured step's context for the kernels of a CPU, which want lists and no padded rows."""

    def __init__(self, pool, given, slots):
        self.count = int((slots >= 0).sum())
        batch = PagedBatch(
            [1] * self.count,
            given.kv_len[: self.count].tolist(),
            given.block_table[: self.count].tolist(),
            [True] * self.count,
            given.page_size,
        )
        self.context = PagedContext(pool, batch, slots[: self.count])

    def attend(self, layer, parts, angles, heads, kv_heads):
        ((qkv, norms),) = parts
        width = self.context.pool.layer(layer)[0].shape[-1]
        out = qkv.new_zeros(len(qkv), heads * width)
        if self.count:
            own = (Projected(qkv[: self.count], norms),)
            angles = tuple(x[: self.count] for x in angles)
            out[: self.count] = self.context.attend(layer, own, angles, heads, kv_heads)
        return out


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "PagedContext", HostContext)
        patch.setattr(frames_module, "_STREAMS", 3)
        yield patch


@pytest.fixture(scope="module")
def plain():
    with Engine("qwen3_omni-tiny") as engine:
        yield engine


@pytest.fixture(scope="module")
def captured(patch):
    """Frames as on a GPU, for batches of 1, 2, 4 and 6; `captures` and `replays` count them."""
    with Engine("qwen3_omni-tiny", max_batch=6, look_ahead=True, **SMALL) as engine:
        speech, engine.captures, engine.replays = engine.model.speech, 0, 0
        speech.lm.sampler = DeviceSampler(speech.lm.sampler.vocab_size, "cpu")

        def recording(step):
            engine.captures += 1
            replay, outputs = replays(step)

            def counted():
                engine.replays += 1
                replay()

            return counted, outputs

        frames = Frames(engine.model.omni, speech.lm, recording)
        engine.model.speech = replace(speech, frames=frames)
        with torch.inference_mode():
            frames.warmup()
        assert engine.captures == 4
        yield engine


def asked(index):
    return {"text": TEXT[index:], "seed": index, "output_modalities": ("audio",), **OPTIONS[index]}


def test_the_published_sounds_come_out_of_what_was_captured_before(captured):
    ready = captured.captures
    several = [request_of(index, **SPOKEN) for index in range(3)]
    for index, result in enumerate(captured.generate_batch(several)):
        assert_golden(index, result)
    assert captured.captures == ready
    assert captured.stats()["nodes"]["talker"]["pages"]["used"] == 0


def test_a_frame_is_one_replay_and_nothing_beside_it(captured, monkeypatch):
    begun, drawn, sampler = captured.replays, [], captured.model.speech.lm.sampler
    draw = sampler.sample
    monkeypatch.setattr(sampler, "sample", lambda *given: drawn.append(1) or draw(*given))
    result = captured.generate(**asked(0))
    assert captured.replays - begun == result.usage.speech_tokens == 8
    assert len(drawn) == 1  # the first code, after the prompt


def test_a_replay_draws_what_the_host_draws_in_any_company(captured, plain):
    long = {"talker_min_tokens": 90, "talker_max_tokens": 90}
    doomed = captured.submit(**asked(0) | long)
    next(iter(doomed))
    handles = [captured.submit(**asked(index)) for index in range(len(OPTIONS))]
    doomed.cancel()
    results = [handle.result() for handle in handles]
    for index, result in enumerate(results):
        expected = plain.generate(**asked(index))
        assert_same_sound(result.audio.pcm, expected.audio.pcm)
        assert result.usage.speech_tokens == expected.usage.speech_tokens
        assert result.finish_reason == expected.finish_reason
    until(lambda: captured.stats()["requests"]["running"] == 0)
    assert captured.stats()["nodes"]["talker"]["pages"]["used"] == 0
    sampler = captured.model.speech.lm.sampler
    assert len(sampler._free) == len(sampler.tables[0]) - 1


def test_streams_that_give_way_to_each_other_go_on_where_they_were(captured, plain, monkeypatch):
    out, swap_out = [], KVGroup.swap_out
    monkeypatch.setattr(KVGroup, "swap_out", lambda group: out.append(group) or swap_out(group))
    more = {"talker_min_tokens": 60, "talker_max_tokens": 60}
    results = captured.generate_batch([asked(index) | more for index in range(3)])
    assert {group.pool for group in out} == {captured.model.speech.lm.pool}
    for index, result in enumerate(results):
        expected = plain.generate(**asked(index) | more)
        assert_same_sound(result.audio.pcm, expected.audio.pcm)


def test_more_streams_than_there_is_room_for_are_captured_again(captured, plain):
    sampler, ready = captured.model.speech.lm.sampler, captured.captures
    room = len(sampler.tables[0]) - 1
    held = [sampler.open(SamplingParams(presence_penalty=1.0), ()) for _ in range(room)]
    found = captured.generate(**asked(0))
    for state in held:
        sampler.close(state)
    assert captured.captures == ready + 1  # a batch of one; others when they come
    assert_same_sound(found.audio.pcm, plain.generate(**asked(0)).audio.pcm)


@pytest.mark.parametrize("name", ["captured", "plain"])
def test_a_batch_that_fails_leaves_every_stream_where_it_was(name, plain, request):
    """What fails beside a frame, or after it was completed, is run again call by call."""
    engine = request.getfixturevalue(name)
    lm, frames, failed = engine.model.speech.lm, engine.model.speech.frames, []
    batch, all_there = [], threading.Event()

    def outer(spans, run=lm.run):
        all_there.wait(60)
        batch[:] = spans
        return run(spans)

    def inner(spans, run=frames._run_spans):
        if len(batch) > 1:
            failed.append(any(isinstance(span.inputs, FrameJob) for span in batch))
            raise ValueError("too many")
        return run(spans)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "run", outer)
        patch.setattr(frames, "_run_spans", inner)
        handles = {index: engine.submit(**asked(index)) for index in (0, 3, 5)}
        all_there.set()
        results = {index: handle.result() for index, handle in handles.items()}
    assert True in failed
    for index, result in results.items():
        assert_same_sound(result.audio.pcm, plain.generate(**asked(index)).audio.pcm)


@pytest.mark.parametrize("name", ["captured", "plain"])
def test_scores_that_are_no_numbers_choose_some_code_and_then_fail(name, request):
    engine = request.getfixturevalue(name)
    speech, number = engine.model.speech, torch.tensor([1])
    step = Step(Tokens(number), 0, torch.full((1, 48), torch.nan))
    others = speech.frames.open(SamplingParams(temperature=1.0, seed=1))
    own = speech.lm.sampler.open(SamplingParams(), ())
    speech.lm.sampler.close(own)
    with speech.lm.open_cache() as kv, pytest.MonkeyPatch.context() as patch:
        kv.reserve(1, set())
        talker = engine.model.omni.talker
        patch.setattr(talker, "logits", lambda hidden: talker.scores(hidden) * torch.nan)
        own = speech.lm.sampler.open(SamplingParams(), ())
        span = Span(kv, FrameJob(step, 300, others, 0), 1, sampler=own, hidden=True)
        (frame,) = speech.frames.run([span])
    assert frame.codes.tolist()[0] == 1
    assert frame.codes.min() >= 0
    assert frame.following.hidden.shape == (1, 48)
    with pytest.raises(RequestFailed, match="no token can be chosen"):
        assert frame.following.token


def test_nothing_in_a_frame_waits_for_the_host(plain, monkeypatch):
    """But for the mixtures of experts, which only a GPU's kernels run without."""
    lm, talker, recorded = plain.model.speech.lm, plain.model.omni.talker, []

    def recording(step):
        recorded.append(strict_replays(step))
        return recorded[-1]

    monkeypatch.setattr(lm, "run", lm.run)  # which `Frames` puts another in place of
    monkeypatch.setattr(lm, "sampler", DeviceSampler(lm.sampler.vocab_size, "cpu"))
    monkeypatch.setattr(lm, "max_batch", 3)
    monkeypatch.setattr(type(talker), "forward", lambda _, inputs, positions, context: inputs)
    monkeypatch.setattr(graphs, "PagedContext", PagedContext)
    Frames(plain.model.omni, lm, recording).warmup()
    assert [len(outputs[1]) for _, outputs in recorded] == [3, 2, 1]


def begun(engine, frames, count=3):
    """Spans of frames of streams that have read some rows."""
    lm, spans = engine.model.speech.lm, []
    torch.manual_seed(0)
    for n in range(count):
        kv, rows = lm.open_cache(), torch.randn(3 + n, 48)
        kv.offset = n / 2
        kv.reserve(len(rows), set())
        own = lm.sampler.open(SamplingParams(repetition_penalty=1.2, top_k=50, seed=n), ())
        (step,) = frames.run([Span(kv, rows, len(rows), sampler=own, hidden=True)])
        step.hidden = step.hidden[-1:]
        kv.reserve(1, set())
        job = FrameJob(step, 300 + n, frames.open(SamplingParams(top_p=0.8, seed=n)), n)
        spans.append(Span(kv, job, 1, sampler=own, hidden=True))
    return spans


def test_the_kernels_of_a_gpu_say_the_same(plain, monkeypatch):
    """All of them, in a padded batch, in Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(graphs, "PagedContext", PagedContext)
    others = begun(plain, plain.model.speech.frames)
    expected = plain.model.speech.frames.run(others)

    def recording(step):
        outputs = []
        return lambda: outputs.extend(step()), outputs

    with Engine("qwen3_omni-tiny", max_batch=4) as engine:
        lm = engine.model.speech.lm
        lm.sampler = DeviceSampler(lm.sampler.vocab_size, "cpu")
        frames = Frames(engine.model.omni, lm, recording)
        spans = begun(engine, frames)
        for name, module in list(sys.modules.items()):
            if name.startswith("mstar.engine.") and hasattr(module, "use_triton"):
                monkeypatch.setattr(module, "use_triton", lambda x: True)
        found = frames.run(spans)
    for span in spans + others:
        span.kv.close()
    for one, other in zip(found, expected, strict=True):
        assert one.codes.tolist() == other.codes.tolist()
        assert one.following.token == other.following.token
        torch.testing.assert_close(one.following.hidden, other.following.hidden, atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_a_gpu_says_what_a_cpu_says(plain):
    with Engine("qwen3_omni-tiny", device="cuda", dtype="float32") as engine:
        results = engine.generate_batch([request_of(index, **SPOKEN) for index in range(3)])
    for index, result in enumerate(results):
        expected = plain.generate(**request_of(index, **SPOKEN)).audio.pcm
        assert result.audio.pcm.shape == expected.shape
        assert np.abs(result.audio.pcm.astype(int) - expected).max() <= 40
