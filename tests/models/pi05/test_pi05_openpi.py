"""What openpi's server makes of observations of its robots, on the tiny checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from pi05_data import TINY, picture

from mstar.models.pi05 import aloha
from mstar.models.pi05.networks import load_policy
from mstar.models.pi05.processing import Processor
from mstar.models.pi05.prompt import Tokenizer
from mstar.models.pi05.robots import PRESETS


@pytest.fixture(scope="module")
def conventions(policy, processor):
    """The policy's config as if openpi had saved it."""
    return replace(policy.config, layout="openpi", state_dim=None, action_dim=None)


def observation(facts, robot):
    """The observation of a golden case, with its images."""
    found = dict(facts["openpi"][robot]["obs"])
    if robot == "libero":
        return {k: picture(v) if "image" in k else v for k, v in found.items()}
    if robot == "droid":
        base, wrist = "observation/exterior_image_1_left", "observation/wrist_image_left"
        found[base] = picture(found[base])
        pixels = picture("obs0_left_wrist_0_rgb.png").transpose(2, 0, 1)
        return {**found, wrist: pixels.astype(np.float32) / 255}
    files = {"cam_high": "obs0_base_0_rgb.png", "cam_right_wrist": "obs1_right_wrist_0_rgb.png"}
    return {**found, "images": {k: picture(v).transpose(2, 0, 1) for k, v in files.items()}}


@pytest.mark.parametrize("name", ["libero", "droid", "aloha"])
def test_the_server_path(name, goldens, policy, processor, conventions):
    facts, robot = goldens.facts["openpi"], PRESETS[name]
    processor = Processor(conventions, processor.tokenizer, statistics=facts["norm_stats"][name])
    observed = robot.observe(observation(goldens.facts, name))
    found = processor.prepare(observed.images, observed.state, observed.prompt)

    mask = facts[name]["image_mask"]
    cameras = [c for c, there in zip(conventions.cameras, mask, strict=True) if there]
    assert list(found.cameras) == cameras
    pixels = ((found.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    expected = goldens[f"openpi.{name}.images"][torch.tensor(mask)]
    assert pixels.equal(expected)
    assert len(found.ids) == facts[name]["n_tokens"]
    assert found.ids.equal(goldens[f"openpi.{name}.tokens"][: len(found.ids)])
    state = np.pad(found.normalised, (0, 32 - len(found.normalised)))
    np.testing.assert_allclose(state, goldens[f"openpi.{name}.state_padded"], atol=1e-12)

    noise = goldens["openpi.noise"]
    chunk = policy.sample(found.images, found.ids, noise, policy.table(10))
    actions = robot.act(processor.finish(chunk.numpy(), found.state), found.state)
    goldens.check(f"openpi.{name}.actions", torch.from_numpy(actions))
    assert str(actions.dtype) == facts[name]["actions_dtype"]
    if name == "libero":
        goldens.check("openpi.protocol.actions", torch.from_numpy(actions))


def test_aloha_is_adapted(goldens):
    facts = goldens.facts["openpi"]["aloha"]
    found = aloha.encode_state(np.array(facts["obs"]["state"]))
    np.testing.assert_allclose(found, facts["adapt_to_pi_state"], atol=1e-12)
    encoded = facts["action_encode"]
    found = aloha.decode_actions(np.array(encoded["in"]))
    np.testing.assert_allclose(found, encoded["out"], atol=1e-12)


def test_prompts_without_the_state(goldens, processor, conventions):
    facts = goldens.facts["openpi"]
    stateless = Processor(
        replace(conventions, state_in_prompt=False),
        processor.tokenizer,
        statistics=facts["norm_stats"]["libero"],
    )
    image = {"base_0_rgb": np.zeros((56, 56, 3), np.uint8)}
    for case in facts["no_state_prompt"]:
        found = stateless.prepare(image, [0.0] * 8, case["prompt"])
        assert found.ids.tolist() == case["ids"]


def test_long_prompts_are_cut(goldens):
    case = goldens.facts["openpi"]["truncation_to_12"]
    found = Tokenizer(TINY / "tokenizer", 12).with_state(case["prompt"], np.array(case["state"]))
    assert found == case["ids"]
    assert len(found) == sum(case["mask"])


def test_a_folder_that_openpi_exports(goldens, policy, tmp_path):
    dims = json.loads((TINY / "config.json").read_text())["custom_dims"]
    config = {"action_horizon": 10, "action_dim": 32, "image_resolution": [56, 56]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "custom_dims": dims}))
    shutil.copy(TINY / "model.safetensors", tmp_path)
    assets = tmp_path / "assets" / "droid"
    assets.mkdir(parents=True)
    table = goldens.facts["openpi"]["norm_stats"]["droid"]
    (assets / "norm_stats.json").write_text(json.dumps(table))
    found = load_policy(tmp_path, device="cpu", dtype=torch.float32)
    assert all(x.equal(policy.state_dict()[name]) for name, x in found.state_dict().items())
    processor = Processor.from_folder(tmp_path, found.config, tokenizer=TINY / "tokenizer")
    assert (processor.resize, processor.action_dim) == ("openpi", 8)
    assert "norm_stats.json" in processor.assumed
