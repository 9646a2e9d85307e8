"""Whole requests of the published implementation, on the tiny checkpoint, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CASES = json.loads((Path(__file__).parents[2] / "data" / "bagel" / "goldens.json").read_text())[
    "cases"
]
TEXT = [name for name, case in CASES.items() if case["kind"] == "text_out"]
IMAGES = [name for name, case in CASES.items() if case["kind"] == "image_out"]


def compare(name, goldens, loop):
    """Check every tensor of a case; none may be left over."""
    seen = dict(loop.seen)
    for index in range(loop.decoder.config.num_hidden_layers):
        k, v = loop.main.kv.cached(index)
        seen[f"k_cache.layer{index}"], seen[f"v_cache.layer{index}"] = k, v
    if goldens.cases[name]["kind"] == "image_out":
        for key in [key for key in seen if key.startswith("latents")]:
            seen[key] = seen[key][-len(goldens[f"{name}.latents"]) :]
    found = goldens.check_all(name, seen)
    every = [key for key in goldens if key.startswith(f"{name}.")]
    assert [key for key in every if key not in found and not key.endswith("step_margin")] == []


@pytest.mark.parametrize("name", TEXT)
def test_text_is_that_of_the_reference(name, goldens, loop, pictures):
    case = goldens.cases[name]
    text = loop.answer(case, pictures)
    compare(name, goldens, loop)
    assert loop.prompt == case["prompt_token_ids"]
    assert loop.returned == case["returned_token_ids"]
    assert text == case["output_text"]


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_those_of_the_reference(name, goldens, loop, pictures):
    case = goldens.cases[name]
    image = loop.paint(case, pictures)
    assert list(image.shape[:2]) == case["image_size_hw"]
    compare(name, goldens, loop)
    if "noise" in case:
        assert loop.seen["noise"].equal(goldens[case["noise"]])
    for branch, context in (("main", loop.main), ("cfg_text", loop.no_text)):
        assert context.length == case["contexts"][branch]["kv_len"]
        assert context.pos == case["contexts"][branch]["position"]
    assert loop.no_image.pos == case["contexts"]["cfg_img"]["position"]
    assert loop.scales == case["cfg_scales_per_step"]
    if "think" in case["params"]:
        assert loop.returned == case["returned_token_ids"]
        assert loop.thought == case["output_text"]
        assert loop.reread == case["reencoded_think_ids"]
