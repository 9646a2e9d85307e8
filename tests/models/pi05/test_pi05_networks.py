"""Configs and weights: what is read, in every published layout, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from pi05_data import FULL, TINY
from safetensors.torch import load_file, save_file

from mstar.errors import WeightsError
from mstar.models.pi05.config import OPENPI_CAMERAS, Pi05Config
from mstar.models.pi05.layout import published_names
from mstar.models.pi05.networks import load_policy, policy_config

HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EMBED = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."


@pytest.fixture
def published():
    return json.loads((TINY / "config.json").read_text())


@pytest.fixture
def saved(tmp_path):
    """Saves tensors beside the tiny config; returns what loads from them."""

    def save(tensors):
        shutil.copy(TINY / "config.json", tmp_path)
        save_file(tensors, tmp_path / "model.safetensors")
        return load_policy(tmp_path, device="cpu", dtype=torch.float32)

    return save


@pytest.fixture
def tensors():
    return load_file(TINY / "model.safetensors")


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and x.equal(y) for (a, x), (b, y) in pairs)


# -- configs -------------------------------------------------------------------------------------


def test_what_files_leave_out_is_as_published():
    full = policy_config(FULL)
    assert full == replace(Pi05Config(), state_dim=32, action_dim=32)
    assert Pi05Config.from_dict({"type": "pi05"}) == Pi05Config()
    assert (full.vision.positions, full.norms, full.cameras) == (256, 37, OPENPI_CAMERAS)


def test_habits_of_real_time_chunking(published):
    assert Pi05Config.from_dict(published).rtc["execution_horizon"] == 10
    published["rtc_config"] = {"enabled": True, "execution_horizon": 20, "debug": False}
    rtc = Pi05Config.from_dict(published).rtc
    assert (rtc["enabled"], rtc["execution_horizon"], rtc["max_guidance_weight"]) == (True, 20, 10)


def test_the_tiny_config():
    config = policy_config(TINY)
    assert (config.state_dim, config.action_dim, config.chunk_size) == (8, 7, 10)
    assert (config.vision.positions, config.norms, config.vocab_size) == (16, 7, 512)
    assert config.action_feature_names[-1] == "gripper"
    assert policy_config(TINY, horizon=5).n_action_steps == 5


def test_cameras_are_in_the_order_of_the_file(published):
    features = published["input_features"]
    published["input_features"] = dict(reversed(features.items()))
    published["empty_cameras"] = 2
    names = ("right_wrist_0_rgb", "left_wrist_0_rgb", "base_0_rgb")
    config = Pi05Config.from_dict(published)
    assert config.cameras == (*names, "empty_camera_0", "empty_camera_1")
    image = {"type": "VISUAL", "shape": [3, 56, 56]}
    published["input_features"]["observation.images.empty_camera_0"] = image
    assert Pi05Config.from_dict(published) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "pi0"}, "type='pi0': must be 'pi05'"),
        ({"use_visual_memory": True}, "use_visual_memory=true: policies with a memory"),
        ({"use_proprioceptive_memory": True}, "use_proprioceptive_memory=true: policies"),
        ({"n_obs_steps": 2}, "n_obs_steps=2: must be 1"),
        ({"paligemma_variant": "gemma_9b"}, "paligemma_variant='gemma_9b': must be one of"),
        ({"image_resolution": [224, 100]}, "image_resolution=.*multiples of 14"),
        ({"image_resolution": 224}, "image_resolution=224: must be a height and a width"),
        ({"chunk_size": 0}, "chunk_size=0: must be an integer"),
        ({"n_action_steps": 11}, "n_action_steps=11: must be at most chunk_size=10"),
        ({"normalization_mapping": {"STATE": "LOG"}}, "normalization_mapping.STATE='LOG'"),
        ({"normalization_mapping": 3}, "normalization_mapping=3: must be an object"),
        ({"custom_dims": {"prefix": {"depth": 4}}}, "depth: 4 in the prefix and 18 in the expert"),
        ({"custom_dims": {"prefix": {"colour": 4}}}, "custom_dims.prefix has unknown colour"),
        ({"custom_dims": {"prefix": {"num_heads": 0}}}, "custom_dims.prefix.num_heads=0"),
        ({"input_features": {"observation.state": {"type": "STATE", "shape": [8]}}}, "an image"),
        ({"output_features": {"action": {"type": "ACTION", "shape": [40]}}}, "action_dim=40: must"),
        ({"empty_cameras": "two"}, "empty_cameras='two': must be an integer"),
        ({"empty_cameras": 10**20}, "must be an integer from 0 to 64"),
        ({"relative_exclude_joints": "gripper"}, "'gripper': must be a list of names"),
        ({"rtc_config": True}, "rtc_config=True: must be an object"),
        ({"rtc_config": {"execution_horizon": 0}}, "execution_horizon=0: must be an integer of"),
        ({"rtc_config": {"prefix_attention_schedule": "STEPS"}}, "'STEPS': must be one of LINEAR"),
        ({"min_period": 0}, "min_period=0: must be a number above 0"),
        ({"rtc_training_max_delay": -1}, "rtc_training_max_delay=-1: must be"),
    ],
)
def test_wrong_configs_are_refused(fields, message, published, tmp_path):
    with pytest.raises(ValueError, match=message):
        Pi05Config.from_dict({**published, **fields})
    (tmp_path / "config.json").write_text(json.dumps({**published, **fields}))
    with pytest.raises(WeightsError, match=message):
        policy_config(tmp_path)


def test_what_openpi_leaves_out_follows_from_the_name_of_its_statistics(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no .*config\.json"):
        policy_config(tmp_path)
    folder = tmp_path / "assets" / "physical-intelligence" / "libero"
    folder.mkdir(parents=True)
    (folder / "norm_stats.json").write_text("{}")
    config = policy_config(tmp_path)
    assert (config.layout, config.chunk_size, config.state_in_prompt) == ("openpi", 10, False)
    exported = {"action_horizon": 16, "action_dim": 32, "precision": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(exported))
    config = policy_config(tmp_path)
    assert (config.layout, config.chunk_size, config.state_in_prompt) == ("openpi", 16, False)
    folder.rename(folder.with_name("mine"))
    assert policy_config(tmp_path).state_in_prompt


# -- weights -------------------------------------------------------------------------------------


def test_names_that_training_prefixes(tensors, saved, policy):
    assert same(saved({f"model.{name}": tensor for name, tensor in tensors.items()}), policy)


def test_a_stale_head_beside_the_embedding_is_not_used(tensors, saved, policy):
    tensors[EMBED], tensors[HEAD] = tensors[HEAD], torch.zeros_like(tensors[HEAD])
    assert same(saved(tensors), policy)
    del tensors[HEAD]
    assert same(saved(tensors), policy)


def test_old_names_and_tensors_that_nothing_needs(tensors, saved, policy):
    old = {
        f"action_{n}" if n.startswith("time_mlp") else n.replace("vision_model.", ""): tensor
        for n, tensor in tensors.items()
    }
    assert f"{TOWER}post_layernorm.weight" not in old
    expert = "paligemma_with_expert.gemma_expert."
    old["state_proj.weight"] = torch.zeros(32, 8)
    old[f"{expert}model.norm.weight"] = torch.zeros(32)
    del old[f"{expert}lm_head.weight"]
    del old["paligemma_with_expert.paligemma.model.language_model.norm.weight"]
    assert same(saved(old), policy)


def test_every_tensor_that_is_needed_has_to_be_there(tensors, saved):
    unused = {
        "paligemma_with_expert.gemma_expert.lm_head.weight",
        "paligemma_with_expert.paligemma.model.language_model.norm.weight",
    }
    last = "paligemma_with_expert.paligemma.model.language_model.layers.2."
    kept = [
        f"{last}{n}.weight" for n in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj")
    ]
    for name in list(tensors)[::7] + kept:
        if name in unused or (name.startswith(last) and name not in kept):
            continue
        with pytest.raises(WeightsError, match="embed_tokens" if name == HEAD else name):
            saved({n: tensor for n, tensor in tensors.items() if n != name})


def test_shapes_are_checked(tensors, saved):
    tensors["action_in_proj.weight"] = torch.zeros(32, 31)
    with pytest.raises(WeightsError, match=r"action_in_proj.weight: found .*31.*expected"):
        saved(tensors)


def test_adapters_are_refused(tensors, saved):
    with pytest.raises(WeightsError, match=r"holds an adapter .*; merge it"):
        saved({f"base_model.{name}": tensor for name, tensor in tensors.items()})


def test_no_weights(tmp_path):
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(WeightsError, match="no weights in"):
        load_policy(tmp_path, device="cpu", dtype=torch.float32)


def test_names_are_those_of_the_base_model(tensors):
    assert {new for new, old in published_names(tensors).items() if new != old} == {EMBED}


def test_random_weights_run():
    policy = load_policy(TINY, device="cpu", dtype=torch.float32, dummy=True)
    images, ids = torch.zeros(2, 3, 56, 56), torch.arange(9)
    found = policy.sample(images, ids, torch.randn(10, 32), policy.table(2))
    assert found.isfinite().all()
