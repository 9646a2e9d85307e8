"""Random small models, side by side with transformers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from qwen_loop import TINY
from torch import nn

from mstar import Engine
from mstar.engine.layers.attention import GrowingContext
from mstar.models.base import Inputs
from mstar.models.qwen3_omni.card import PARAMETERS
from mstar.models.qwen3_omni.mel import log_mel, mel_filters
from mstar.models.qwen3_omni.networks import load_networks
from mstar.models.qwen3_omni.pixels import normalised
from mstar.models.qwen3_omni.prompt import Heard, Pictured, lay_out_pieces, next_position
from mstar.models.qwen3_omni.vision import Grid
from mstar.models.qwen3_omni.visuals import read_picture

pytest.importorskip("transformers", "5.0")  # older ones lack parts that are compared
theirs = pytest.importorskip("transformers.models.qwen3_omni_moe")

CHANGES = {  # of the tiny checkpoint's config
    "few_experts": {
        "thinker_config.text_config": {"num_experts": 3, "num_experts_per_tok": 1},
        "talker_config.text_config": {"num_experts": 5, "num_experts_per_tok": 4},
    },
    "many_heads": {
        "thinker_config.text_config": {
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "norm_topk_prob": False,
        },
        "talker_config.text_config": {"num_attention_heads": 4, "num_key_value_heads": 4},
        "thinker_config.vision_config": {
            "deepstack_visual_indexes": [0, 4],
            "num_position_embeddings": 49,
        },
        "thinker_config.audio_config": {"n_window_infer": 100},
        "code2wav_config": {"sliding_window": 3, "upsample_rates": [3, 2], "decoder_dim": 24},
    },
}


@pytest.fixture(scope="module", params=CHANGES)
def both(request, tmp_path_factory):
    """The same random weights in both, by way of the published layout."""
    raw = json.loads((TINY / "config.json").read_text())
    for path, values in CHANGES[request.param].items():
        part = raw
        for name in path.split("."):
            part = part[name]
        part.update(values)
    folder: Path = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps(raw))
    config = theirs.Qwen3OmniMoeConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    reference = theirs.Qwen3OmniMoeForConditionalGeneration(config).eval().float()
    for name, parameter in reference.named_parameters():
        if name.startswith("code2wav") and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
        elif "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    reference.save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    reference.folder = folder
    return reference, load_networks(folder, device="cpu", dtype=torch.float32)


def close(found, expected, near=2e-4):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=near * max(1.0, scale), rtol=0)


def test_sounds(both):
    reference, own = both
    for frames in (7, 60, 100, 245):
        features = torch.randn(128, frames)
        expected = reference.thinker.model.audio_tower(
            features, feature_lens=torch.tensor([frames])
        ).last_hidden_state
        close(own.omni.audio(features, [frames]), expected)


def test_images_and_videos(both):
    reference, own = both
    grids = [Grid(1, 2, 14), Grid(3, 6, 4), Grid(1, 10, 2)]
    patches = torch.randn(sum(grid.patches for grid in grids), 1536)
    expected = reference.thinker.model.visual(patches, grid_thw=torch.tensor(grids))
    seen = own.omni.vision(patches, grids)
    close(seen.hidden, expected.last_hidden_state)
    close(seen.rows, expected.pooler_output)
    for found, features in zip(seen.features, expected.deepstack_features, strict=True):
        close(found, features)


def test_the_thinker_with_media(both):
    reference, own = both
    config, thinker = own.omni.config.thinker, own.omni.thinker
    grid, frames = Grid(1, 4, 6), 137
    features, patches = torch.randn(128, frames), torch.randn(grid.patches, 1536)
    heard = Heard(config.audio.tokens(frames))
    start, end = [config.vision_start_token_id], [config.vision_end_token_id]
    about = [config.audio_start_token_id], [config.audio_end_token_id]
    segments = lay_out_pieces(
        [[5, 6, *start], Pictured(grid), [*end, 9, *about[0]], heard, [*about[1], 7, 8]], config
    )
    ids = torch.tensor([token for segment in segments for token in segment.ids])
    expected = reference.thinker(
        input_ids=ids[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=patches,
        image_grid_thw=torch.tensor([grid]),
        input_features=features[None],
        feature_attention_mask=torch.ones(1, frames, dtype=torch.long),
    )
    seen = own.omni.vision(patches, [grid])
    inputs = thinker.embed(ids)
    inputs[ids == config.image_token_id] = thinker.wide(seen.rows, seen.features)
    inputs[ids == config.audio_token_id] = thinker.wide(own.omni.audio(features, [frames]))
    positions = torch.cat([segment.positions for segment in segments], 1)
    close(thinker.logits(thinker(inputs, positions)), expected.logits[0])
    kv, found = GrowingContext(), []  # in pieces of any size, as the engine feeds them
    for part in torch.arange(len(ids)).split(9):
        found.append(thinker.logits(thinker(inputs[part], positions[:, part], kv)))
    close(torch.cat(found), expected.logits[0])


def test_the_talker_and_the_code_predictor(both):
    reference, own = both
    talker, config = own.omni.talker, own.omni.config.talker
    x = torch.randn(11, config.text.hidden_size)
    positions = torch.rand(3, 11) * 40
    expected = reference.talker.model(
        inputs_embeds=x[None], position_ids=positions[:, None], use_cache=False
    ).last_hidden_state[0]
    hidden = talker(x, positions)
    close(hidden, expected)
    close(talker.scores(hidden), reference.talker.codec_head(expected))
    thought = torch.randn(4, config.thinker_hidden_size)
    for name in ("text_projection", "hidden_projection"):
        close(getattr(talker, name)(thought), getattr(reference.talker, name)(thought))
    predictor, kept = reference.talker.code_predictor, []
    codes = talker.code_predictor(x[:3], x[3:6], lambda scores: scores.argmax(-1), keep=kept)
    rows = [x[:3], x[3:6]]
    for k, scores in enumerate(kept):
        states = predictor.model(inputs_embeds=torch.stack(rows, 1)).last_hidden_state[:, -1]
        close(scores, predictor.lm_head[k](states))
        rows.append(predictor.get_input_embeddings()[k](codes[:, k]))
    close(talker.code_predictor.embedded(codes), sum(rows[2:]))


def test_the_vocoder(both):
    reference, own = both
    config = own.omni.config.vocoder
    codes = torch.randint(config.codebook_size, (2, config.num_quantizers, 9))
    expected = reference.code2wav(codes)[:, 0]
    close(own.vocoder(codes), expected)
    streams = [own.vocoder.stream(), own.vocoder.stream()]
    parts = [own.vocoder.extend(part, streams) for part in codes.split([2, 3, 1, 3], -1)]
    close(torch.cat(parts, 1), expected)


def test_mel_filters():
    from transformers.audio_utils import mel_filter_bank

    expected = mel_filter_bank(201, 128, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    torch.testing.assert_close(
        mel_filters(128), torch.from_numpy(expected).float().T.contiguous(), atol=1e-7, rtol=1e-5
    )


# -- positions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(loop):
    """The published positions of ids."""
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    kind = modeling.Qwen3OmniMoePreTrainedModelForConditionalGeneration
    config = theirs.Qwen3OmniMoeConfig.from_pretrained(TINY).thinker_config
    stub = SimpleNamespace(config=config, spatial_merge_size=2)
    stub.get_llm_pos_ids_for_vision = lambda *args: kind.get_llm_pos_ids_for_vision(stub, *args)
    return lambda **given: kind.get_rope_index(stub, **given)


@pytest.mark.parametrize("seed", range(12))
def test_positions_of_random_prompts(seed, index, loop):
    draw = random.Random(seed)
    together = seed % 2 == 1  # then all videos have their sound with them, as published
    config = loop.config.thinker
    pieces, images, videos, seconds, frames = [], [], [], [], []
    ends = []
    for _ in range(draw.randint(1, 4)):
        kind = draw.choice(("sound", "image", "video"))
        text = [*ends, *[3] * draw.randint(1, 4)]
        grid = Grid(draw.randint(1, 5), 2 * draw.randint(1, 4), 2 * draw.randint(1, 4))
        heard = draw.randint(1, 400)
        sounds = kind == "sound" or (kind == "video" and together)
        about = [(config.audio_start_token_id, config.audio_end_token_id)] * sounds
        if kind != "sound":
            about.insert(0, (config.vision_start_token_id, config.vision_end_token_id))
        pieces.append(text + [begin for begin, _ in about])
        ends = [end for _, end in reversed(about)]
        tokens = config.audio.tokens(heard)
        if sounds:
            frames.append(heard)
        if kind == "sound":
            pieces.append(Heard(tokens))
        elif kind == "image":
            grid = grid._replace(times=1)
            images.append(grid)
            pieces.append(Pictured(grid))
        else:
            videos.append(grid)
            seconds.append(draw.choice((1.0, 0.5, 2 / 3, 0.4)))
            pieces.append(Pictured(grid, seconds[-1], tokens if together else 0))
    segments = lay_out_pieces([*pieces, [*ends, 3, 3]], config)
    ids = torch.tensor([[token for segment in segments for token in segment.ids]])
    found = torch.cat([segment.positions for segment in segments], 1)
    expected, offset = index(
        input_ids=ids,
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        attention_mask=torch.ones_like(ids),
        use_audio_in_video=together,
        audio_seqlens=torch.tensor(frames),
        second_per_grids=torch.tensor(seconds),
    )
    torch.testing.assert_close(found, expected[:, 0], atol=1e-5, rtol=0)  # an ulp or two
    whole = (found == found.floor()).all(0)
    assert torch.equal(found[:, whole], expected[:, 0, whole])
    assert next_position(segments) == pytest.approx(float(offset) + ids.numel(), abs=1e-5)


def test_an_answer_goes_on_after_a_video_that_is_higher_than_its_sound_is_long(index, loop):
    config = loop.config.thinker
    grid, frames = Grid(1, 40, 4), 37
    before = [config.vision_start_token_id, config.audio_start_token_id]
    after = [config.audio_end_token_id, config.vision_end_token_id, 3, 3]
    seen = Pictured(grid, 1.0, config.audio.tokens(frames))
    segments = lay_out_pieces([before, seen, after], config)
    ids = torch.tensor([[token for segment in segments for token in segment.ids]])
    _, offset = index(
        input_ids=ids,
        video_grid_thw=torch.tensor([grid]),
        attention_mask=torch.ones_like(ids),
        use_audio_in_video=True,
        audio_seqlens=torch.tensor([frames]),
        second_per_grids=torch.tensor([1.0]),
    )
    assert segments[-1].positions.max() < 21
    assert next_position(segments) == float(offset) + ids.numel() == 22


@pytest.fixture(scope="module")
def engine(both):
    with Engine(both[0].folder) as engine:
        yield engine


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
@pytest.mark.parametrize("kind", ["text", "image", "audio"])
def test_whole_requests_through_the_engine(both, engine, kind):
    """Text and samples, of prompts with an image and a sound of odd sizes."""
    reference, own = both
    config, rng = own.omni.config, np.random.default_rng(3)
    media, given = {}, {}
    if kind == "image":
        media = {"images": [rng.integers(0, 256, (45, 101, 3), np.uint8)]}
        seen = read_picture(media["images"][0], config.thinker.vision)
        given["pixel_values"] = normalised(seen.patches)
        given["image_grid_thw"] = torch.tensor([seen.grid])
    if kind == "audio":
        clip = rng.standard_normal(9001).astype(np.float32) / 8
        media = {"audio": [(clip, 16000)]}
        given["input_features"] = log_mel(clip)[None]
        frames = given["input_features"].shape[2]
        given["feature_attention_mask"] = torch.ones(1, frames, dtype=torch.long)
    params = {"max_tokens": 7, "talker_max_tokens": 9, "talker_temperature": 0.0}
    outputs = ("text", "audio")
    found = engine.generate(text="Hello", **media, output_modalities=outputs, **params)
    plan = engine.model.prepare(Inputs(text="Hello", **media), PARAMETERS.validate({}), outputs)
    prompt = torch.tensor([plan.ids])
    written, waves = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        thinker_max_new_tokens=7,
        thinker_eos_token_id=config.im_end_token_id,
        talker_do_sample=False,
        talker_max_new_tokens=9,
        **given,
    )
    answer = written[0, prompt.shape[1] :].tolist()
    assert found.text == engine.model.tokenizer.decode(answer)
    expected = (waves[0].flatten().numpy() * np.float32(32767)).astype(np.int16)
    assert found.audio.pcm.shape == expected.shape
    assert np.abs(found.audio.pcm.astype(int) - expected).max() <= 8
