"""Every part alone, against the published implementation."""

from __future__ import annotations

import pytest
import torch
from qwen_loop import Loop

from mstar.engine.layers.moe import experts_grouped, experts_loop, route
from mstar.models.qwen3_omni.mrope import MRotary
from mstar.models.qwen3_omni.speech import speaker_id
from mstar.models.qwen3_omni.vision import Grid


def greedy(scores):
    return scores.argmax(-1)


def test_clips_do_not_depend_on_each_other(goldens, loop: Loop):
    lengths = goldens.facts["at_feature_lens"]
    goldens.check("at.out", loop.omni.audio(goldens["at.features"], lengths))


@pytest.mark.parametrize("lengths", [[], [638, 0], [600]])
def test_clips_of_other_lengths_than_said_are_refused(lengths, goldens, loop):
    with pytest.raises(ValueError, match="638 frames"):
        loop.omni.audio(goldens["at.features"], lengths)


def test_images_do_not_depend_on_each_other(goldens, loop):
    kinds = ("1.image", "4.video", "5.video")
    patches = torch.cat([goldens[f"{kind}.pixel_values"] for kind in kinds])
    grids = [Grid(*row) for kind in kinds for row in goldens[f"{kind}.grid_thw"].tolist()]
    seen = loop.omni.vision(patches, grids)
    rows = [grid.patches // 4 for grid in grids]
    for index, kind in enumerate(kinds):
        goldens.check(f"{kind}.tower_merged", seen.rows.split(rows)[index])
        for k, features in enumerate(seen.features):
            goldens.check(f"{kind}.deepstack{k}", features.split(rows)[index])
    with pytest.raises(ValueError, match="grids"):
        loop.omni.vision(patches, grids[:2])


@pytest.mark.parametrize("who", ["thinker", "talker"])
def test_experts_are_those_of_the_reference(who, goldens, loop):
    layer = getattr(loop.omni, who).decoder.layers[0].mlp
    x = goldens[f"moe_{who}.x"]
    logits = x @ layer.gate.weight.T
    goldens.check(f"moe_{who}.router_logits", logits)
    weights, experts = route(logits, layer.top_k)
    goldens.check(f"moe_{who}.weights", weights)
    goldens.check(f"moe_{who}.experts", experts)
    goldens.check(f"moe_{who}.y", layer(x))
    given = x, weights, experts, layer.gate_up, layer.down
    plain = experts_loop(*given)
    torch.testing.assert_close(experts_grouped(*given), plain, atol=1e-5, rtol=1e-5)


def test_rotary_angles_of_three_axes(goldens, loop):
    text = loop.config.thinker.text
    rotary = MRotary(text.head_dim, text.rope_theta, text.mrope_section)
    cos, sin = rotary.angles(goldens["mrope.positions"])
    goldens.check("mrope.cos", torch.cat([cos, cos], -1))
    goldens.check("mrope.sin", torch.cat([sin, sin], -1))


def test_equal_positions_on_all_axes_are_one(loop):
    rotary = loop.omni.thinker.decoder.rotary
    places = torch.tensor([0.0, 7.0, 12.5])
    for one, three in zip(rotary.angles(places), rotary.angles(places.expand(3, -1)), strict=True):
        assert torch.equal(one, three)


def test_a_batch_of_frames_is_completed(goldens, loop):
    inputs, kept = goldens["cpb.inputs_embeds"], []
    codes = loop.omni.talker.code_predictor(inputs[:, 0], inputs[:, 1], greedy, keep=kept)
    goldens.check("cpb.codes", codes)
    goldens.check("cpb.logits", torch.stack(kept, 1))


def test_rows_that_choose_a_voice(goldens, loop):
    names = goldens.facts["speaker_rows_order"]
    config = loop.omni.talker.config
    rows = torch.stack([loop.speaker.voice(speaker_id(config, name.title())) for name in names])
    goldens.check("speaker_rows", rows)
