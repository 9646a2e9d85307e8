"""BAGEL end to end: the published results, alone and in any company."""

from __future__ import annotations

import json
import random
import threading
import time

import numpy as np
import pytest
import torch
from asking import DATA, assert_same_picture, file_of, levels, request_of
from safetensors.numpy import load_file

from mstar import Engine, InvalidRequest, OutOfMemory, RequestCancelled
from mstar.engine.kvcache import KVCache
from mstar.types import ImageChunk, ProgressChunk, TextChunk
from tests.waiting import until

GOLDEN = load_file(DATA / "goldens.safetensors")
CASES = json.loads((DATA / "goldens.json").read_text())["cases"]
BRIEF = {"num_timesteps": 5, "width": 64, "height": 64, "output_modalities": ("image",)}


@pytest.fixture(scope="module")
def engine():
    with Engine("bagel-tiny") as engine:
        yield engine


@pytest.fixture(scope="module", params=["cached", "uncached", "small chunks", "look ahead"])
def any_engine(request):
    options = {
        "cached": {},
        "uncached": {"prefix_cache": False},
        "small chunks": {"token_budget": 7},
        "look ahead": {"look_ahead": True},
    }[request.param]
    with Engine("bagel-tiny", **options) as engine:
        yield engine


def assert_golden(name, result):
    case = CASES[name]
    assert result.text == case.get("output_text", "")
    if case["kind"] == "image_out":
        (png,) = result.images
        assert_same_picture(levels(png), GOLDEN[f"{name}.image"])
    elif case["stop_reason"] == "length":
        assert result.finish_reason == "length"
    else:
        assert result.finish_reason == "stop"


def pages_used(engine):
    return engine.stats()["nodes"]["lm"]["pages"]["used"]


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_published_ones(name, any_engine):
    assert_golden(name, any_engine.generate(**request_of(CASES[name])))


def test_results_are_the_published_ones_with_all_in_flight(engine):
    """Twice each, in any order. Pictures stay within the rounding of products of other heights."""
    names = [*CASES, *CASES]
    random.Random(0).shuffle(names)
    handles = [engine.submit(**request_of(CASES[name])) for name in names]
    for name, handle in zip(names, handles, strict=True):
        assert_golden(name, handle.result(120))
    assert pages_used(engine) == 0
    assert max(engine.stats()["nodes"]["lm"]["batch_sizes"]) > 4
    assert max(engine.stats()["nodes"]["flow"]["batch_sizes"]) > 1


def test_too_small_a_cache_only_takes_longer():
    names = ["edit_text_channel", "t2i_think", "interleave", "und", "edit_think"] * 2
    with Engine("bagel-tiny", kv_tokens=800) as engine:
        handles = [engine.submit(**request_of(CASES[name])) for name in names]
        for name, handle in zip(names, handles, strict=True):
            assert_golden(name, handle.result(120))
        assert pages_used(engine) == 0
        assert engine.stats()["nodes"]["lm"]["pages"]["preemptions"] > 0


def test_a_seed_decides_the_picture(engine):
    first, again, other = (
        engine.generate_image("A boat", seed=seed, **_without_outputs(BRIEF)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert engine.generate_image("A boat", **_without_outputs(BRIEF)) != engine.generate_image(
        "A boat", **_without_outputs(BRIEF)
    )


def test_noise_can_be_given_instead_of_a_seed(engine):
    case = CASES["edit_text_channel"]
    noise = GOLDEN["edit_text_channel.noise"]
    (eps,) = [GOLDEN[name] for name in GOLDEN if name.startswith("edit_text_channel.vae0.eps")]
    asked = {**request_of(case), "seed": 5}
    for vae_noise in (eps, [eps], eps.tolist()):
        result = engine.generate(**asked, latents=noise, vae_noise=vae_noise)
        assert_golden("edit_text_channel", result)


def test_noise_may_be_in_half_precision(engine):
    noise = torch.randn(16, 64).bfloat16()
    one, other = (
        engine.generate(text="A boat", latents=x, **BRIEF) for x in (noise, noise.float())
    )
    assert one.images == other.images


def test_several_images_come_from_noise_that_follows_on(engine):
    asked = {**BRIEF, "text": "A boat", "seed": 3}
    several = engine.generate(**asked, num_images=3)
    single = engine.generate(**asked)
    assert_same_picture(levels(several.images[0]), levels(single.images[0]))
    assert len(set(several.images)) == 3
    chunks = [event for event in several.raw if isinstance(event, ImageChunk)]
    assert [chunk.metadata for chunk in chunks] == [{"index": i, "seed": 3} for i in range(3)]
    assert several.usage.generated_tokens == 3 * single.usage.generated_tokens == 3 * 16


@pytest.mark.parametrize("more", [{}, {"negative_prompt": "word " * 20}])
def test_more_images_than_there_is_room_for_are_drawn_in_waves(more):
    asked = {**BRIEF, "text": "A boat", "seed": 3, "num_images": 9, **more}
    with Engine("bagel-tiny") as engine:
        plenty = engine.generate(**asked)
    with Engine("bagel-tiny", kv_tokens=512) as engine:
        scarce = engine.generate(**asked)
        assert pages_used(engine) == 0
    for one, other in zip(plenty.images, scarce.images, strict=True):
        assert_same_picture(levels(one), levels(other))


def test_noise_for_the_encoder_leaves_the_start_noise_of_the_seed(engine):
    case = CASES["edit_text_channel"]
    eps = GOLDEN["edit_text_channel.vae0.eps"]
    assert_golden("edit_text_channel", engine.generate(**request_of(case), vae_noise=eps))


def test_a_thought_that_was_cut_is_told_with_the_image(engine):
    for name, reason in (("t2i_think", "stop"), ("edit_think", "length")):
        result = engine.generate(**request_of(CASES[name]))
        (image,) = (event for event in result.raw if isinstance(event, ImageChunk))
        assert image.metadata["thought"] == reason


def test_what_ends_a_thought_is_not_thought(engine, monkeypatch):
    case = {**request_of(CASES["t2i_think"]), "output_modalities": ("text", "image")}
    stop = engine.generate(**case).text[4]
    read, text_span = [], engine.model.tokenizer.text_span
    monkeypatch.setattr(
        engine.model.tokenizer, "text_span", lambda text: read.append(text) or text_span(text)
    )
    shown = engine.generate(**case, stop=stop).text
    assert stop not in shown
    assert read[-1] == shown


def test_previews_do_not_keep_others_from_their_images(engine):
    greedy = [
        engine.submit(
            text="A boat", num_images=4, preview_every=1, **{**BRIEF, "num_timesteps": 400}
        )
        for _ in range(4)
    ]
    engine.generate(text="A car", **{**BRIEF, "num_timesteps": 20})
    assert engine.stats()["nodes"]["decode"]["waiting"] <= 4 * 4  # none wait behind those
    assert not any(handle.done for handle in greedy)
    for handle in greedy:
        handle.cancel()


def test_branches_that_make_no_difference_are_not_computed(engine):
    latents = 16  # tokens of a branch, of 64 x 64 pixels

    def passes(**more):
        seen = []
        decoder = engine.model.bagel.decoder
        hook = decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[3:]))
        engine.generate(text="A boat", **{**BRIEF, "num_timesteps": 50, **more})
        hook.remove()
        return sum(lead // latents for (lead,) in filter(None, seen))

    assert passes() == 49 + 41  # with the guidance by images of the default, which needs no pass
    assert passes(cfg_interval=(0, 1)) == 2 * 49
    assert passes(cfg_text_scale=1.0) == 49
    assert passes(cfg_interval=(0, 0)) == 49
    assert passes(enable_taylorseer=True) < 49


def test_the_branches_of_a_step_share_a_batch(engine):
    seen = []
    decoder = engine.model.bagel.decoder
    hook = decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    result = engine.generate(**{**request_of(CASES["edit_text_channel"]), "num_timesteps": 9})
    hook.remove()
    assert seen[-8:] == [3 * (result.usage.generated_tokens + 2)] * 8


def test_requests_at_different_steps_share_batches(engine):
    before = engine.stats()["nodes"]["flow"]["batch_sizes"]
    handles = []
    for seed in range(4):
        asked = {**BRIEF, "num_timesteps": 60, "seed": seed, "progress": True}
        handles.append(engine.submit(text="A boat", **asked))
        next(iter(handles[-1]))  # it is on its way
    alone = [handle.result(60).images[0] for handle in handles]
    after = engine.stats()["nodes"]["flow"]["batch_sizes"]
    assert after.get(4, 0) > before.get(4, 0)
    for seed, png in enumerate(alone):
        again = engine.generate(text="A boat", seed=seed, **{**BRIEF, "num_timesteps": 60})
        assert_same_picture(levels(png), levels(again.images[0]))


def test_images_of_other_sizes_take_turns(engine):
    long = engine.submit(text="A boat", progress=True, **{**BRIEF, "num_timesteps": 1000})
    next(iter(long))
    brief = engine.generate(text="A boat", **{**BRIEF, "height": 32})
    assert levels(brief.images[0]).shape == (32, 64, 3)
    assert not long.done
    long.cancel()


def test_a_request_for_many_images_leaves_others_their_turn(engine, monkeypatch):
    monkeypatch.setattr(engine.model.flow, "budget", 1)  # one image at a time
    asked = {**BRIEF, "num_timesteps": 1000, "num_images": 4, "progress": True}
    many = engine.submit(text="A boat", **asked)
    next(iter(many))
    engine.generate(text="A boat", **BRIEF)
    assert not many.done
    many.cancel()


def test_images_that_do_not_go_together_come_one_after_another(engine, monkeypatch):
    monkeypatch.setattr(engine.model.flow, "budget", 1)
    asked = {**BRIEF, "num_images": 2, "progress": True, "stream": True}
    events = [e for e in engine.generate(text="A boat", **asked) if "index" in e.metadata]
    assert [event.metadata["index"] for event in events] == [0] * 5 + [1] * 5
    assert [isinstance(event, ImageChunk) for event in events] == ([False] * 4 + [True]) * 2


def test_an_image_that_never_fits_is_an_error_of_its_own(monkeypatch):
    with Engine("bagel-tiny", kv_tokens=160) as engine:
        with monkeypatch.context() as careless:
            careless.setattr(engine.model.lm.pool, "check_fits", lambda *_: None)
            with pytest.raises(OutOfMemory, match="holds 160 tokens"):
                engine.generate(text="A boat", **{**BRIEF, "width": 128, "height": 128})
        assert pages_used(engine) == 0
        # Without images and thoughts there are two contexts, whatever the guidance by images.
        assert engine.generate(text="A boat", **BRIEF).images


def test_an_error_of_the_cache_is_told_as_it_is(engine, monkeypatch):
    reserve = KVCache.reserve

    def failing(kv, tokens, busy):
        if tokens == 16 + 2:
            raise MemoryError("no room on the host")
        reserve(kv, tokens, busy)

    with monkeypatch.context() as broken:
        broken.setattr(KVCache, "reserve", failing)
        with pytest.raises(Exception, match="no room on the host"):
            engine.generate(text="A boat", **BRIEF)
    assert pages_used(engine) == 0
    assert engine.generate(text="A boat", **BRIEF).images


def test_a_picture_is_encoded_once_for_all_questions():
    with Engine("bagel-tiny") as engine:
        cached = []
        for question in ("What is it?", "Where is it?", "What is it?"):
            result = engine.chat(question, images=file_of("image0.png"), max_output_tokens=4)
            cached.append(result.usage.cached_tokens)
            assert result.usage.image_tokens == 110
        assert cached[0] == 0
        assert cached[1] >= 110
        assert engine.stats()["nodes"]["vision"]["calls"] == 1


def test_what_encoders_make_of_a_picture_is_kept():
    asked = {"text": "Red.", "images": file_of("image0.png"), "output_modalities": ("image",)}
    with Engine("bagel-tiny", prefix_cache=False) as engine:
        for seed in range(2):
            engine.generate(**asked, num_timesteps=2, seed=seed)
        nodes = engine.stats()["nodes"]
    assert (nodes["vision"]["calls"], nodes["encode"]["calls"]) == (1, 1)


def test_text_of_a_thought_comes_before_the_image(engine):
    case = request_of(CASES["t2i_think"])
    events = list(engine.generate(**{**case, "output_modalities": ("text", "image")}, stream=True))
    kinds = [type(event) for event in events if event.finish_reason is None]
    assert kinds == [TextChunk] * (len(kinds) - 1) + [ImageChunk]
    assert (
        "".join(e.text for e in events if isinstance(e, TextChunk))
        == (CASES["t2i_think"]["output_text"])
    )


def test_progress_and_previews_are_told_on_the_way(engine):
    asked = {**request_of(CASES["t2i_global"]), "progress": True, "preview_every": 3}
    events = list(engine.generate(**asked, stream=True))
    told = [event for event in events if isinstance(event, ProgressChunk)]
    assert [(event.step, event.steps) for event in told] == [(i, 8) for i in range(1, 9)]
    assert {event.metadata["index"] for event in told} == {0}
    previews = {event.step: levels(event.preview) for event in told if event.preview}
    assert sorted(previews) == [3, 6]
    final = GOLDEN["t2i_global.image"]
    distance = {
        step: np.abs(preview.astype(float) - final).mean() for step, preview in previews.items()
    }
    assert distance[6] < distance[3]
    assert isinstance(events[events.index(told[-1]) + 1], ImageChunk)


def test_without_asking_there_is_neither_progress_nor_preview(engine):
    events = list(engine.generate(**{**BRIEF, "text": "A boat"}, stream=True))
    assert not any(isinstance(event, ProgressChunk) for event in events)


def test_a_request_can_be_cancelled_between_steps(engine):
    handle = engine.submit(text="A boat", progress=True, **{**BRIEF, "num_timesteps": 1000})
    next(iter(handle))
    handle.cancel()
    with pytest.raises(RequestCancelled):
        handle.result(10)
    assert len(handle.taken(0)[0]) < 900
    assert pages_used(engine) == 0


def test_a_negative_prompt_takes_the_place_of_nothing(engine):
    asked = {**BRIEF, "text": "A boat", "seed": 1}
    plain, none, away = (
        engine.generate(**asked, negative_prompt=text).images[0] for text in (None, " ", "a car")
    )
    assert plain == none
    assert plain != away


def test_order_is_kept_and_matters(engine):
    image = file_of("image0.png")

    def said(**given):
        return engine.generate(**given, max_output_tokens=12).text

    first = said(text="What?", images=image)
    assert first == said(text="What?", images=image, input_modalities=("image", "text"))
    parts = [{"type": "text", "text": "What?"}, {"type": "image", "image": image}]
    last = said(messages=[{"role": "user", "content": parts}])
    assert last == said(text="What?", images=image, input_modalities=("text", "image"))
    assert first != last


def test_a_conversation_is_its_texts_in_order(engine):
    """There are no roles in the prompt layout: an answer in the history is a text as any other."""
    question = {"role": "user", "content": "Hello there"}
    answer = engine.generate(messages=[question], max_output_tokens=6)
    history = [question, {"role": "assistant", "content": answer.text}]
    more = engine.generate(
        messages=[*history, {"role": "user", "content": "And?"}], max_output_tokens=6
    )
    assert more.usage.prompt_tokens > answer.usage.prompt_tokens
    assert more.text != answer.text
    empty = {"role": "assistant", "content": ""}
    assert engine.generate(messages=[empty, question], max_output_tokens=6).text == answer.text
    system = {"role": "system", "content": "Be brief."}
    assert engine.generate(messages=[system, question], max_output_tokens=6).text != answer.text


def test_text_can_be_sampled_stopped_and_scored(engine):
    asked = {"text": "Write a short poem", "max_output_tokens": 20}
    greedy = engine.generate(**asked)
    drawn = [engine.generate(**asked, temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    stop = greedy.text[8:11]
    stopped = engine.generate(**asked, stop=[stop])
    assert stopped.text == greedy.text[: greedy.text.index(stop)]
    assert stopped.finish_reason == "stop"
    scored = engine.generate(**asked, logprobs=2)
    scores = [s for e in scored.raw for s in e.metadata.get("logprobs", ())]
    assert scored.text == greedy.text == "".join(score["token"] for score in scores)
    assert all(score["top_logprobs"][0]["logprob"] == score["logprob"] for score in scores)
    assert len(scores[0]["top_logprobs"]) == 2


def test_requests_from_many_threads_are_cancelled_and_served_side_by_side(engine):
    names = ["t2i_global", "edit_global", "und", "chat"]
    failures = []

    def client(index):
        random_ = random.Random(index)
        for _ in range(3):
            name = random_.choice(names)
            handle = engine.submit(**request_of(CASES[name]))
            if random_.random() < 0.4:
                time.sleep(random_.random() * 0.2)
                handle.cancel()
                continue
            try:
                assert_golden(name, handle.result(120))
            except AssertionError as error:
                failures.append(error)

    threads = [threading.Thread(target=client, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    until(lambda: not pages_used(engine) and not engine.stats()["requests"]["running"])


def test_published_sizes_load_with_random_weights_of_fewer_layers(tmp_path):
    """`load_format="dummy"` reads configs only; here with a body that fits into a test."""
    from mstar.models.bagel.card import CARD

    for file in (CARD.full / "bagel").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "llm_config.json").read_text())
    small = {"num_hidden_layers": 1, "hidden_size": 112, "intermediate_size": 64}
    (tmp_path / "llm_config.json").write_text(json.dumps({**config, **small}))
    vision = json.loads((tmp_path / "vit_config.json").read_text())
    (tmp_path / "vit_config.json").write_text(json.dumps({**vision, "num_hidden_layers": 2}))
    with Engine("bagel", weights=tmp_path, load_format="dummy", kv_tokens=4096) as engine:
        asked = {"num_timesteps": 2, "width": 64, "height": 32}
        (image,) = engine.generate(text="x", output_modalities=("image",), **asked).images
        assert levels(image).shape == (32, 64, 3)
        with pytest.raises(InvalidRequest, match="at most 1024; nearest: 1024"):
            engine.generate(text="x", output_modalities=("image",), **{**asked, "height": 1040})


def _without_outputs(asked):
    return {name: value for name, value in asked.items() if name != "output_modalities"}
