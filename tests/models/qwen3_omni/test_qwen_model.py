"""Qwen3-Omni end to end: the published results, alone and in any company."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from qwen_asking import (
    CASES,
    SMALL_VIDEOS,
    SPOKEN,
    assert_golden,
    assert_same_sound,
    image_of,
    pcm_of,
    request_of,
    sound_of,
    video_of,
)
from qwen_loop import TINY

from mstar import Engine, InvalidRequest, RequestCancelled
from mstar.models.base import Inputs
from mstar.models.qwen3_omni.card import PARAMETERS
from mstar.models.qwen3_omni.frames import FrameJob
from mstar.models.qwen3_omni.speech import speaker_id
from mstar.types import AudioChunk
from tests.waiting import until

HELLO = "Hello there, what do you see?"
SAMPLED = {"temperature": 0.8, "output_modalities": ("text", "audio"), "talker_max_tokens": 40}


@pytest.fixture(scope="module")
def engine():
    with Engine("qwen3_omni-tiny") as engine:
        yield engine


@pytest.fixture(
    scope="module", params=["cached", "uncached", "small chunks", "look ahead", "one by one"]
)
def any_engine(request):
    options = {
        "cached": {},
        "uncached": {"prefix_cache": False},
        "small chunks": {"token_budget": 7},
        "look ahead": {"look_ahead": True},
        "one by one": {"max_batch": 1},
    }[request.param]
    with Engine("qwen3_omni-tiny", **options) as engine:
        yield engine


def calls(engine):
    return {name: node["calls"] for name, node in engine.stats()["nodes"].items()}


def jobs_of(spans):
    return [span.inputs for span in spans if isinstance(span.inputs, FrameJob)]


def pages_used(engine):
    nodes = engine.stats()["nodes"]
    return nodes["thinker"]["pages"]["used"] + nodes["talker"]["pages"]["used"]


def test_the_published_texts_and_sounds_come_out_of_one_batch(any_engine):
    cases = range(len(CASES))
    for spoken in (False, True, True):
        more = SPOKEN if spoken else {}
        results = any_engine.generate_batch([request_of(index, **more) for index in cases])
        for index, result in zip(cases, results, strict=True):
            assert (result.audio is not None) == spoken
            assert_golden(index, result)
    assert pages_used(any_engine) == 0


def test_text_alone_runs_nothing_but_the_thinker(engine):
    before = calls(engine)
    assert engine.chat(HELLO).finish_reason == "stop"
    ran = {name for name, count in calls(engine).items() if count > before[name]}
    assert ran == {"thinker"}


@pytest.mark.parametrize("stop", [None, "never said"])
def test_speech_is_made_while_the_text_is_still_written(engine, stop, monkeypatch):
    ran = []
    for node in (engine.model.thinker, engine.model.speech.lm):

        def run(calls, node=node, run=node.run):
            ran.append(node.name)
            return run(calls)

        monkeypatch.setattr(node, "run", run)
    events = list(engine.stream(**request_of(0, **SPOKEN), stop=stop))
    assert "thinker" in ran[ran.index("talker") :]
    chunks = [event.pcm for event in events if isinstance(event, AudioChunk)]
    frame = engine.model.config.vocoder.frame_samples
    assert len(chunks[0]) == 2 * frame - 555
    assert [len(chunk) for chunk in chunks[1:-2]] == [4 * frame, 8 * frame]
    assert_same_sound(np.concatenate(chunks), engine.generate(**request_of(0, **SPOKEN)).audio.pcm)
    assert events[-1].finish_reason == "stop"


def test_the_answer_may_be_heard_alone(engine):
    result = engine.generate(**request_of(1, **SPOKEN | {"output_modalities": ("audio",)}))
    assert result.text == ""
    assert len(result.audio.pcm) == CASES[1]["samples"]


def test_streamed_sound_is_that_of_one_decoding(engine):
    heard = {}
    model = engine.model
    run = model.speech.sound.run

    def listening(jobs):
        for job in jobs:
            heard.setdefault(job.stream, []).extend(job.frames)
        return run(jobs)

    model.speech.sound.run = listening
    try:
        asked = {"text": HELLO, "seed": 3, **SAMPLED, "talker_min_tokens": 40}
        result = engine.generate(**asked)
    finally:
        model.speech.sound.run = run
    (frames,) = heard.values()
    assert len(frames) == 39  # the last one that the limit allows is not completed
    whole = model.speech.vocoder(torch.stack(frames, 1)[None])[0]
    assert_same_sound(result.audio.pcm, pcm_of(whole))
    assert result.finish_reason == "length"


def test_a_second_turn_computes_only_what_is_new(engine):
    asked = request_of(3, **SPOKEN)
    first = engine.generate(**asked)
    before = calls(engine)
    turns = [
        *asked["messages"],
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "and what do you hear?"},
    ]
    again = {**asked, "messages": turns}
    second = engine.generate(**again)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens // 16 * 16
    after = calls(engine)
    assert [after[name] - before[name] for name in ("vision", "audio")] == [0, 0]
    with Engine("qwen3_omni-tiny", prefix_cache=False) as other:
        expected = other.generate(**again)
    assert second.text == expected.text
    assert_same_sound(second.audio.pcm, expected.audio.pcm)


def test_speech_after_text_alone_hears_the_media_again(engine):
    picture = np.ascontiguousarray(image_of(1)[::-1])
    asked = {"text": "Describe the picture in one sentence." * 2, "images": [picture]}
    written = engine.generate(**asked)
    reused = engine.generate(**asked)
    assert reused.usage.cached_tokens == 16
    spoken = engine.generate(**asked, **SPOKEN)
    assert spoken.usage.cached_tokens == 0  # the states of the picture were not kept
    again = engine.generate(**asked, **SPOKEN)
    assert again.usage.cached_tokens == reused.usage.cached_tokens
    assert written.text == spoken.text == again.text
    assert_same_sound(spoken.audio.pcm, again.audio.pcm)


@pytest.mark.parametrize("together", [False, True])
def test_videos_of_odd_rates_have_positions_between_integers(engine, loop, together):
    video, sound = video_of(4), sound_of(2)
    messages = [
        {"role": "user", "content": [{"type": "video", "video": "x"}]},
        {"role": "assistant", "content": "A moving dot."},
        {"role": "user", "content": HELLO},
    ]
    options = {"video": video, "fps": 1.7, "together": together}
    text, wave = loop.run(messages, sound=sound[0] if together else None, **options)
    messages[0]["content"][0]["video"] = (video, sound) if together else video
    asked = {"messages": messages, "fps": 1.7, **SMALL_VIDEOS, **SPOKEN}
    asked |= {"use_audio_in_video": together, "talker_max_tokens": len(wave) // 1920 + 3}
    found = engine.generate_batch([asked, {**asked, "output_modalities": ("text",)}])
    assert [result.text for result in found] == [text, text]
    assert_same_sound(found[0].audio.pcm, pcm_of(wave))


# -- reading aloud -----------------------------------------------------------------------------


def test_a_given_text_is_read_aloud_without_the_thinker(engine):
    text = CASES[0]["response"]
    before = calls(engine)
    speech = engine.tts(text, voice="chelsie", talker_temperature=0.0, talker_max_tokens=30)
    after = calls(engine)
    assert after["thinker"] == before["thinker"]
    assert after["talker"] > before["talker"]
    model = engine.model
    plan = model.prepare(Inputs(text=text), PARAMETERS.validate({}), ("audio",))
    assert plan.speech.aloud == model.tokenizer.encode(text)
    assert plan.speech.speaker == speaker_id(model.config.talker, "ETHAN")
    result = engine.generate(
        text=text, voice="chelsie", read_aloud=True, talker_max_tokens=30, **SPOKEN
    )
    assert result.text == text
    assert_same_sound(result.audio.pcm, speech.pcm)
    answer = engine.generate(text=text, read_aloud=False, **{**SPOKEN, "talker_max_tokens": 3})
    assert calls(engine)["thinker"] > after["thinker"]
    assert len(answer.audio.pcm) == 2 * 1920 - 555


def test_the_talker_is_told_the_text_and_then_its_end(engine):
    told = []
    talker = engine.model.speech.lm
    run = talker.run
    talker.run = lambda spans: told.extend(job.text for job in jobs_of(spans)) or run(spans)
    config, text = engine.model.config, "A moving dot."
    ids = engine.model.tokenizer.encode(text)
    try:
        engine.tts(text, talker_min_tokens=9, talker_max_tokens=9)
        assert told == [*ids[1:], config.tts_eos_token_id] + [config.tts_pad_token_id] * (
            8 - len(ids)
        )
        for more, spoken in (
            ({"max_tokens": 3}, 2),  # the last one is not spoken, as published
            ({"stop": "small red"}, 3),
        ):
            told.clear()
            result = engine.generate(**request_of(0, **SPOKEN, **more))
            written = engine.model.tokenizer.encode(CASES[0]["response"])
            assert told[:spoken] == [*written[1:spoken], config.tts_eos_token_id]
            assert CASES[0]["response"].startswith(result.text)
    finally:
        talker.run = run


def test_an_empty_answer_is_silent(engine):
    end = engine.model.config.im_end_token_id
    result = engine.generate(text=HELLO, logit_bias={end: 100}, **SPOKEN)
    assert (result.text, len(result.audio.pcm), result.finish_reason) == ("", 0, "stop")


def test_the_system_prompt_may_be_a_parameter(engine):
    system, user = CASES[0]["messages"]
    result = engine.generate(text=user["content"], system=system["content"])
    assert_golden(0, result)


def test_voices_sound_different_and_seeds_repeat(engine):
    def speech(voice, seed):
        return engine.tts(HELLO, voice=voice, seed=seed, talker_max_tokens=12).pcm

    assert_same_sound(speech("Aiden", 1), speech("aiden", 1))
    assert not np.array_equal(speech("Aiden", 1), speech("Chelsie", 1))


# -- in company ----------------------------------------------------------------------------------


def mixed(index):
    """Requests of all kinds, sampled."""
    more = {"seed": index, "temperature": 0.7}
    if index % 4 == 1:
        return {"text": f"{HELLO} {index}", "max_tokens": 20, **more}
    if index % 4 == 2:
        more |= {"output_modalities": ("audio",), "talker_max_tokens": 9 + index}
        return {"text": "It goes up.", **more}
    more |= {"output_modalities": ("text", "audio"), "talker_max_tokens": 6 + index}
    return request_of(index % 6, **more)


def test_requests_do_not_change_each_other(engine):
    alone = {index: engine.generate(**mixed(index)) for index in range(12)}
    doomed = [
        engine.submit(**request_of(index % 6, **SPOKEN, ignore_eos=True, talker_min_tokens=4000))
        for index in range(4)
    ]
    found = {}

    def ask(index):
        found[index] = engine.generate(**mixed(index))

    threads = [threading.Thread(target=ask, args=(index,)) for index in alone]
    for thread in threads:
        thread.start()
    for handle in doomed:
        next(iter(handle))
        handle.cancel()
    for thread in threads:
        thread.join()
    for handle in doomed:
        with pytest.raises(RequestCancelled):
            handle.result()
    for index, expected in alone.items():
        assert found[index].text == expected.text
        if expected.audio is not None:
            assert_same_sound(found[index].audio.pcm, expected.audio.pcm)
    until(lambda: engine.stats()["requests"]["running"] == 0)
    assert pages_used(engine) == 0
    assert len(engine.model.thinker.pool.groups) == len(engine.model.speech.lm.pool.groups) == 0
    assert all(node["waiting"] == 0 for node in engine.stats()["nodes"].values())


def test_a_talker_that_fails_ends_its_request_alone(engine):
    talker = engine.model.speech.lm
    run = talker.run

    def failing(spans):
        if any(job.sampler.params.top_k == 7 for job in jobs_of(spans)):
            raise ValueError("no such frame")
        return run(spans)

    talker.run = failing
    try:
        bad = engine.submit(**request_of(0, **SPOKEN), code_predictor_top_k=7)
        assert_golden(1, engine.generate(**request_of(1, **SPOKEN)))
        with pytest.raises(Exception, match="no such frame"):
            bad.result()
    finally:
        talker.run = run
    assert pages_used(engine) == 0


def test_a_cache_that_is_too_small_for_all_serves_them_one_after_another():
    with Engine("qwen3_omni-tiny", kv_tokens=144) as engine:
        asked = [request_of(index, **SPOKEN) for index in range(len(CASES))]
        for index, result in enumerate(engine.generate_batch(asked)):
            assert_golden(index, result)


# -- how it is loaded ------------------------------------------------------------------------------


def test_without_speech_no_talker_is_loaded():
    with Engine("qwen3_omni-tiny", options={"speech": False}) as engine:
        assert engine.model.omni.talker is None
        assert_golden(1, engine.generate(**request_of(1)))
        with pytest.raises(InvalidRequest, match="no Talker"):
            engine.tts("Hello")


def test_bfloat16_says_the_same():
    with Engine("qwen3_omni-tiny", dtype="bfloat16") as engine:
        result = engine.generate(**request_of(1, **SPOKEN))
    assert result.text == CASES[1]["response"]
    assert len(result.audio.pcm) == CASES[1]["samples"]


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_is_served(named):
    model = {"model": "qwen3_omni", "weights": TINY} if named else {"model": TINY}
    with Engine(**model) as engine:
        assert engine.card.name == "qwen3_omni"
        assert engine.generate(**request_of(0)).text == CASES[0]["response"]


def test_dummy_weights_run_everything():
    with Engine("qwen3_omni-tiny", load_format="dummy") as engine:
        result = engine.generate(
            **request_of(5, **SPOKEN, max_tokens=4, talker_max_tokens=4, talker_min_tokens=4)
        )
        assert len(result.audio.pcm) == 3 * 1920 - 555
