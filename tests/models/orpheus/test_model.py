"""Orpheus end to end: goldens, streaming, parameters, many requests at a time."""

import functools
import json
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mstar import Engine, InvalidRequest, RequestCancelled, RequestFailed
from mstar.models import orpheus
from mstar.models.orpheus import model
from mstar.models.orpheus.prompt import STOP, split_sentences
from mstar.types import fold

DATA = Path(__file__).parents[2] / "data" / "orpheus"
GOLDEN = load_file(DATA / "goldens.safetensors")
CASES = json.loads((DATA / "goldens.json").read_text())["cases"]
GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "codec_noise": "off"}
UTTERANCES = 5
LONG = " ".join([CASES[0]["text"]] * UTTERANCES)
TINY = Path(orpheus.__file__).parent / "tiny"


def ask(case: dict, **more) -> dict:
    return {"text": case["text"], "voice": case["voice"] or "", **more}


def golden_pcm(index: int) -> np.ndarray:
    return np.trunc(np.clip(GOLDEN[f"c{index}.wav_full"], -1, 1) * 32767).astype(np.int16)


@pytest.fixture(scope="module")
def engine():
    with Engine("orpheus-tiny") as engine:
        yield engine


@pytest.fixture(scope="module", params=["prefix_cache", "no_prefix_cache", "look_ahead"])
def any_engine(request):
    options = {
        "prefix_cache": {},
        "no_prefix_cache": {"prefix_cache": False},
        "look_ahead": {"look_ahead": True},
    }[request.param]
    with Engine("orpheus-tiny", **options) as engine:
        yield engine


def assert_golden(result, case: dict) -> None:
    index = case["index"]
    assert result.finish_reason == "stop"
    assert len(result.audio) == case["samples"]
    assert result.usage.speech_tokens == result.usage.generated_tokens == case["n_new"]
    assert result.usage.audio_seconds == pytest.approx(case["samples"] / 24000)
    if case["has_wav_full"]:
        # The goldens agree within 5e-6, which may tip a truncation by one.
        difference = result.audio.pcm.astype(int) - golden_pcm(index)
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 5e-3
    else:
        for name, part in (("head", slice(0, 2048)), ("tail", slice(-2048, None))):
            want = GOLDEN[f"c{index}.wav_full_i16_{name}"].astype(int)
            assert np.abs(result.audio.pcm[part] - want).max() <= 1
        wave = result.audio.pcm / 32767
        assert np.abs(wave).sum() == pytest.approx(case["wav_abs_sum"], rel=1e-3)


def test_greedy_speech_is_the_published_one(any_engine):
    for _ in range(2):  # cold, then with the prompt in the prefix cache
        for case in CASES:
            assert_golden(any_engine.generate(**ask(case, **GREEDY)), case)


def test_a_batch_of_all_prompts_is_the_published_speech(any_engine):
    results = any_engine.generate_batch([ask(case, **GREEDY) for case in CASES])
    for case, result in zip(CASES, results, strict=True):
        assert_golden(result, case)


def test_streamed_chunks_are_the_whole_utterance_to_the_sample(engine):
    for case in CASES:
        whole = engine.generate(**ask(case, seed=3))
        events = list(engine.generate(**ask(case, seed=3), stream=True))
        assert np.array_equal(fold(events).audio.pcm, whole.audio.pcm)
        assert all(len(event.pcm) == 2048 for event in events[:-1])
        assert len(events[-1].pcm) == 0
        assert events[-1].finish_reason == "stop"
        assert events[-1].usage.generated_tokens == whole.usage.generated_tokens


def test_less_look_ahead_changes_only_the_first_frames_and_less_the_more_there_is(engine):
    exact = engine.generate(**ask(CASES[3], seed=1)).audio.pcm.reshape(-1, 2048)
    errors = []
    for lookahead in (0, 1, 2):
        early = fold(engine.generate(**ask(CASES[3], seed=1), stream=True, lookahead=lookahead))
        early = early.audio.pcm.reshape(-1, 2048)
        changed = 3 - lookahead
        assert early.shape == exact.shape
        assert np.array_equal(early[changed:], exact[changed:])
        errors.append(np.sqrt(np.mean((early[:changed] / 32767 - exact[:changed] / 32767) ** 2)))
    assert errors[0] > errors[1] > errors[2] > 0


def test_the_first_chunk_comes_after_as_many_tokens_as_the_look_ahead_asks(engine):
    for lookahead, tokens in ((0, 7), (1, 14), (3, 28)):
        events = list(
            engine.generate(
                **ask(CASES[0], **GREEDY),
                stream=True,
                lookahead=lookahead,
                max_output_tokens=tokens,
                ignore_eos=True,
            )
        )
        assert events[-1].finish_reason == "length"
        assert len(events) == 1 + tokens // 7
        fewer = {**ask(CASES[0], **GREEDY), "max_output_tokens": tokens - 1}
        whole = fold(engine.generate(**fewer, stream=True, lookahead=lookahead))
        assert len(whole.audio) == (tokens // 7 - 1) * 2048


def test_codec_noise_is_seeded(engine):
    first, again, other, off = (
        engine.generate(**ask(CASES[0], temperature=0, repetition_penalty=1.0, **more)).audio.pcm
        for more in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"codec_noise": "off"})
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, off)


def test_sampled_speech_depends_on_the_seed_alone(engine):
    params = {"temperature": 30.0, "top_p": 1.0, "max_output_tokens": 60, "ignore_eos": True}

    def tokens(seed):
        return engine.generate(**ask(CASES[1], seed=seed, **params)).audio.pcm.tolist()

    assert tokens(5) == tokens(5)


def test_no_voice_means_no_prefix(engine):
    result = engine.generate(**ask(CASES[4], **GREEDY))
    assert result.usage.prompt_tokens == CASES[4]["n_prompt"]


@pytest.mark.parametrize("spell", [int, lambda token: f"<custom_token_{token - 128256}>"])
def test_stop_ends_the_speech_where_the_token_would_have_been(engine, spell):
    tokens = GOLDEN["c0.greedy"].tolist()
    result = engine.generate(**ask(CASES[0], **GREEDY), stop=[spell(tokens[31])])
    assert result.usage.generated_tokens == tokens.index(tokens[31]) + 1
    assert result.finish_reason == "stop"


def test_an_utterance_without_frames_is_silence(engine):
    result = engine.generate(**ask(CASES[0], **GREEDY), logit_bias={STOP: 100})
    assert (len(result.audio), result.finish_reason) == (0, "stop")


def test_length_ends_with_the_frames_that_are_complete(engine):
    result = engine.generate(**ask(CASES[3], **GREEDY), max_output_tokens=100)
    assert result.finish_reason == "length"
    assert len(result.audio) == (100 // 7) * 2048


@pytest.fixture
def split(monkeypatch):
    """Short utterances, such as the tiny checkpoint can speak, count as long text."""
    short = functools.partial(split_sentences, longest=len(CASES[0]["text"]))
    monkeypatch.setattr(model, "split_sentences", short)


def test_long_text_is_spoken_to_its_end_in_order(engine, split):
    params = {"temperature": 0, "repetition_penalty": 1.0, "voice": "tara"}
    whole = engine.generate(text=LONG, **params, seed=7)
    streamed = fold(engine.generate(text=LONG, **params, seed=7, stream=True))
    assert np.array_equal(whole.audio.pcm, streamed.audio.pcm)
    assert len(whole.audio) == UTTERANCES * CASES[0]["samples"]
    assert whole.usage.generated_tokens == UTTERANCES * CASES[0]["n_new"]
    ramp = 120  # samples: 5 ms
    for index, joined in enumerate(np.split(whole.audio.pcm, UTTERANCES)):
        # Each utterance has a codec noise of its own, so this sees their order, too.
        alone = engine.generate(text=CASES[0]["text"], **params, seed=7 + index).audio.pcm
        assert np.array_equal(joined[ramp:-ramp], alone[ramp:-ramp])
        assert np.array_equal(joined[:ramp], alone[:ramp]) == (index == 0)
        assert np.array_equal(joined[-ramp:], alone[-ramp:]) == (index == UTTERANCES - 1)


def test_text_is_not_split_unless_it_is_long_or_if_it_must_not_be(engine, split):
    prompt = len(engine.model.encode(f"tara: {LONG}")) + 5
    one = engine.generate(text=LONG, **GREEDY, split_text=False, max_output_tokens=10)
    assert (one.usage.prompt_tokens, one.usage.generated_tokens) == (prompt, 10)
    several = engine.generate(text=LONG, **GREEDY, max_output_tokens=10)
    assert several.finish_reason == "length"
    assert several.usage.speech_tokens == several.usage.generated_tokens == UTTERANCES * 10


@pytest.fixture
def jobs(engine, monkeypatch):
    """What the codec was given, in order; a function put into `jobs.check` may refuse it."""
    run, seen = engine.model.snac.run, Seen()

    def watch(batch):
        for job in batch:
            seen.check(job)
        seen.extend(batch)
        return run(batch)

    monkeypatch.setattr(engine.model.snac, "run", watch)
    return seen


class Seen(list):
    def check(self, job) -> None:
        pass


def test_the_codec_is_at_work_for_later_utterances_before_the_first_is_complete(
    engine, split, jobs
):
    fold(engine.generate(text=LONG, **GREEDY, stream=True))
    first_of_a_later_one = next(i for i, job in enumerate(jobs) if job.fade_in)
    end_of_the_first = next(i for i, job in enumerate(jobs) if job.fade_out)
    assert first_of_a_later_one < end_of_the_first


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_utterances_of_one_frame_are_faded_too_whatever_the_look_ahead(engine, split, lookahead):
    params = {**GREEDY, "max_output_tokens": 7, "lookahead": lookahead}
    for stream in (False, True):
        result = engine.submit(text=LONG, **params, stream=stream).result(timeout=60)
        frames = result.audio.pcm.reshape(UTTERANCES, 2048)
        assert not frames[:-1, -1].any()
        assert not frames[1:, 0].any()
        assert frames[0, 0]
        assert frames[-1, -1]


def test_long_text_that_is_cancelled_leaves_nothing_behind(engine, split):
    handle = engine.submit(text=LONG, **GREEDY, ignore_eos=True, stream=True)
    next(iter(handle))
    handle.cancel()
    with pytest.raises(RequestCancelled):
        handle.result(timeout=60)
    assert engine.stats()["nodes"]["lm"]["pages"]["used"] == 0
    assert engine.model.snac.waiting == 0


def test_a_failure_of_the_codec_in_a_later_utterance_fails_the_request(
    engine, split, jobs, monkeypatch
):
    def refuse(job):
        if job.fade_in:
            raise RuntimeError("broken")

    monkeypatch.setattr(jobs, "check", refuse)
    for stream in (False, True):
        with pytest.raises(RequestFailed, match="broken"):
            engine.submit(text=LONG, **GREEDY, stream=stream).result(timeout=60)
        assert engine.stats()["nodes"]["lm"]["pages"]["used"] == 0
    assert_golden(engine.generate(**ask(CASES[0], **GREEDY)), CASES[0])


@pytest.mark.parametrize(
    ("bad", "field", "says"),
    [
        ({"voice": "bob"}, "voice", "tara, leah"),
        ({"temperature": -1}, "temperature", "from 0 to 100"),
        ({"temperature": 101}, "temperature", "from 0 to 100"),
        ({"repetition_penalty": 0}, "repetition_penalty", "from 0.01 to 100"),
        ({"repetition_penalty": 1e30}, "repetition_penalty", "from 0.01 to 100"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "must not exceed max_output_tokens=8"),
        ({"min_tokens": 4097}, "min_tokens", "must not exceed max_output_tokens=4096"),
        ({"temperatur": 1}, "temperatur", "did you mean 'temperature'"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_output_tokens": 0}, "max_output_tokens", "integer from 1"),
        ({"max_output_tokens": "ten"}, "max_output_tokens", "int"),
        ({"stop": ["<custom_token_99999>"]}, "stop", "not a token"),
        ({"lookahead": 4}, "lookahead", "3"),
        ({"output_modalities": ("image",)}, "output_modalities", "audio"),
        ({"output_modalities": ("smell",)}, "output_modalities", "must be one of"),
        ({"images": b"x"}, "images", "takes text"),
        ({"text": 7}, "text", "string"),
        ({"text": None}, "text", "nothing was given"),
        ({"text": "a\ud800b"}, "text", "character 1 is half of a surrogate pair"),
        ({"voice": "\udfff", "force_voice": True}, "voice", "half of a surrogate pair"),
        ({"text": "a" * 100_001}, "text", "has 100001 characters; one request speaks at most 1000"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "does not chat"),
        ({"request_id": ""}, "request_id", "empty"),
        ({"timeout": -1}, "timeout", "above 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_queued(engine, bad, field, says):
    with pytest.raises(InvalidRequest, match=says) as caught:
        engine.submit(**{"text": "hello", **bad})
    assert caught.value.field == field
    assert engine.stats()["queue_depth"] == 0


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    with Engine("orpheus-tiny", kv_tokens=256) as engine:
        with pytest.raises(
            InvalidRequest, match=r"may need 4117 tokens .* holds 256 \(16 pages"
        ) as c:
            engine.generate(**ask(CASES[0]), max_output_tokens=4096)
        assert c.value.field == "max_output_tokens"
        with pytest.raises(InvalidRequest, match=r"may need 321 tokens .* holds 256") as c:
            engine.generate(**ask(CASES[0]), min_tokens=300)
        assert c.value.field == "min_tokens"
        with pytest.raises(InvalidRequest, match=r"holds 256 \(16 pages") as c:
            engine.generate(text="word " * 300, split_text=False)
        assert c.value.field == "text"
        assert_golden(engine.generate(**ask(CASES[0], **GREEDY, max_output_tokens=200)), CASES[0])


def test_without_a_limit_of_its_own_a_request_has_what_fits_the_cache():
    with Engine("orpheus-tiny", kv_tokens=256) as engine:
        assert_golden(engine.generate(**ask(CASES[0], **GREEDY)), CASES[0])
        for limit in ({}, {"max_output_tokens": None}):
            result = engine.generate(**ask(CASES[0], **GREEDY), ignore_eos=True, **limit)
            assert result.finish_reason == "length"
            assert result.usage.generated_tokens == 256 - CASES[0]["n_prompt"]


def test_without_a_limit_of_its_own_a_request_has_what_fits_the_model(tmp_path):
    shutil.copytree(TINY / "lm", tmp_path / "lm")
    config = json.loads((TINY / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 120})
    )
    with Engine("orpheus", weights={"lm": tmp_path / "lm", "snac": TINY / "snac"}) as engine:
        assert_golden(engine.generate(**ask(CASES[0], **GREEDY)), CASES[0])
        result = engine.generate(**ask(CASES[0], **GREEDY), ignore_eos=True)
        assert result.finish_reason == "length"
        assert result.usage.generated_tokens == 120 - CASES[0]["n_prompt"]
        with pytest.raises(InvalidRequest, match="may need 121 tokens, and the model takes 120"):
            engine.generate(**ask(CASES[0]), max_output_tokens=121 - CASES[0]["n_prompt"])


def test_control_tokens_in_the_text_are_only_text(engine):
    plain = engine.generate(text="hello", **GREEDY, max_output_tokens=20)
    for token in ("<|eot_id|>", "<custom_token_5>", "<custom_token_2>"):
        result = engine.generate(text=f"hello{token}", **GREEDY, max_output_tokens=20)
        assert result.usage.prompt_tokens > plain.usage.prompt_tokens + 1


def test_many_requests_on_a_tiny_cache_are_preempted_and_come_out_the_same():
    with Engine("orpheus-tiny", kv_tokens=512) as engine:
        requests = [ask(case, **GREEDY, max_output_tokens=300) for case in CASES * 3]
        results = engine.generate_batch(requests)
        for case, result in zip(CASES * 3, results, strict=True):
            assert_golden(result, case)
        pages = engine.stats()["nodes"]["lm"]["pages"]
        assert pages["used"] == 0
        assert pages["preemptions"] > 0


def test_thirty_two_requests_some_cancelled_some_bad_leave_the_others_untouched():
    chance = random.Random(0)
    before = {thread.name for thread in threading.enumerate()}
    wanted = [
        ask(CASES[i % 6], seed=i, max_output_tokens=chance.choice((40, 120, 400)))
        for i in range(32)
    ]
    with Engine("orpheus-tiny", max_batch=16) as engine:
        solo = [engine.generate(**request).audio.pcm for request in wanted]
        handles = {}
        for index, request in enumerate(wanted):
            if index % 8 == 7:
                with pytest.raises(InvalidRequest):
                    engine.submit(**{**request, "voice": "nobody"})
                continue
            handles[index] = engine.submit(**request, stream=bool(index % 2))
        for index in list(handles)[::5]:
            next(iter(handles[index]))
            handles[index].cancel()
        for index, handle in handles.items():
            try:
                pcm = handle.result(timeout=60).audio.pcm
            except RequestCancelled as stopped:
                assert index in list(handles)[::5]
                pcm = stopped.partial.audio.pcm
                assert np.array_equal(pcm, solo[index][: len(pcm)])
            else:
                assert np.array_equal(pcm, solo[index])
        stats = engine.stats()
        assert stats["nodes"]["lm"]["pages"]["used"] == 0
        assert stats["requests"]["running"] == stats["requests"]["waiting"] == 0
        assert max(stats["nodes"]["lm"]["batch_sizes"]) > 8
    assert {thread.name for thread in threading.enumerate()} <= before


def test_dummy_weights_need_no_files(tmp_path):
    for part in ("lm", "snac"):
        (tmp_path / part).mkdir()
        source = Path(Engine.__init__.__globals__["registry"].get("orpheus").tiny) / part
        for name in ("config.json", "tokenizer.json"):
            if (source / name).exists():
                (tmp_path / part / name).write_bytes((source / name).read_bytes())
    with Engine("orpheus", weights=str(tmp_path), load_format="dummy") as engine:
        result = engine.generate(text="hi", max_output_tokens=8, ignore_eos=True)
        assert result.usage.generated_tokens == 8


def test_both_storage_variants_of_the_codec_and_a_dict_of_folders_load(tmp_path):
    from mstar.models import registry

    tiny = registry.get("orpheus").tiny
    (tmp_path / "config.json").write_bytes((tiny / "snac" / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes((DATA / "snac_pytorch_model.bin").read_bytes())
    with Engine("orpheus", weights={"lm": tiny / "lm", "snac": tmp_path}) as engine:
        assert_golden(engine.generate(**ask(CASES[0], **GREEDY)), CASES[0])
