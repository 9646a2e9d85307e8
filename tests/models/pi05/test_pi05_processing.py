"""From observations to what the networks take, and back to robot units."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from pi05_data import FULL, TINY, picture
from PIL import Image
from safetensors.torch import load_file

from mstar.errors import InvalidRequest, WeightsError
from mstar.models.pi05.config import Pi05Config
from mstar.models.pi05.images import model_images
from mstar.models.pi05.networks import policy_config
from mstar.models.pi05.normalise import Normalizer, relative_mask
from mstar.models.pi05.processing import Processor
from mstar.models.pi05.prompt import cleaned, prompt_text, state_bins
from mstar.models.pi05.resize import fitted, sampled
from mstar.models.pi05.statistics import Processors, read_processors, read_statistics

# -- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bins(dtype, goldens):
    values, bins = zip(*goldens.facts["state_bins"], strict=True)
    if dtype == np.float32:  # the goldens are of float32, in which the second one is not below -1
        assert state_bins(np.array(values, np.float32)).tolist() == list(bins)
    edges = np.arange(256, dtype=dtype) / 128 - 1
    assert state_bins(edges).tolist() == list(range(256))
    assert state_bins(np.nextafter(edges, dtype(-9))).tolist() == list(range(-1, 255))


def test_tasks_are_cleaned(goldens):
    for task, expected in goldens.facts["prompt_cleaning"]:
        assert cleaned(task) == expected


def test_prompts(goldens, processor):
    for row, expected in enumerate(goldens.facts["pair"]["full_prompts"]):
        observation = goldens.observation(row)
        found = processor.prepare(**observation)
        assert prompt_text(observation["task"], found.normalised) == expected


def test_prompts_with_padded_states(goldens, processor):
    padded = Processor.from_folder(TINY, processor.config, state_padded_prompt=True)
    for row, expected in enumerate(goldens.facts["state_padded_prompts"]):
        found = padded.prepare(**goldens.observation(row)).ids.tolist()
        text = processor.tokenizer._fast.encode(expected, add_special_tokens=False).ids
        assert found == [2, *text][:200]


def test_a_prompt_that_is_cut_is_told_once(goldens, processor, caplog):
    observation = goldens.observation(0)
    for task in ("go", "go " * 200, "go " * 200):
        processor.prepare(**{**observation, "task": task})
    (line,) = [record.getMessage() for record in caplog.records]
    assert "tokens is cut to 200" in line


# -- images --------------------------------------------------------------------------------------


def seen(image, target, rule):
    """One image, as the vision tower takes it."""
    return model_images({"image": image}, target, rule)[0]


@pytest.mark.parametrize("rule", ["lerobot", "openpi"])
def test_every_form_of_an_image_is_the_same_image(rule):
    pixels = picture("obs0_base_0_rgb.png")
    expected = seen(pixels, (56, 56), rule)
    assert expected.shape == (3, 56, 56)
    assert expected.dtype == torch.float32
    forms = [
        pixels.transpose(2, 0, 1),
        torch.from_numpy(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0),
        Image.fromarray(pixels),
        pixels[::-1][::-1],
        np.frombuffer(pixels.tobytes(), np.uint8).reshape(pixels.shape),
        pixels[None],
    ]
    for form in forms:
        assert seen(form, (56, 56), rule).equal(expected)
    if rule == "lerobot":
        floats = pixels.astype(np.float32) / 255
        for form in (floats, floats.transpose(2, 0, 1), torch.from_numpy(pixels) / 255):
            torch.testing.assert_close(seen(form, (56, 56), rule), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (31, 640), (40, 20), (1, 3), (56, 56)])
@pytest.mark.parametrize("target", [(56, 56), (224, 196)])
def test_images_are_sampled_as_published(size, target):
    dice = np.random.default_rng(0)
    pixels = dice.integers(0, 256, (*size, 3), np.uint8)
    expected = sampled(torch.from_numpy(pixels).permute(2, 0, 1), target)
    for image in (pixels, dice.permutation(pixels), pixels):  # in buffers that were used
        found = seen(image, target, "lerobot")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found.abs().max() <= 1


def test_buffers_are_kept():
    pixels = np.zeros((480, 640, 3), np.uint8)
    seen(pixels, (224, 224), "lerobot")
    tracemalloc.start()
    seen(pixels, (224, 224), "lerobot")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000  # bytes of numpy (the result is torch's); the rows between are 640 kB


def test_threads_do_not_disturb_each_other():
    dice = np.random.default_rng(0)
    pictures = [dice.integers(0, 256, (480, 640, 3), np.uint8) for _ in range(4)]
    expected = [seen(image, (224, 224), "lerobot") for image in pictures]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda image: seen(image, (224, 224), "lerobot"), pictures * 5)
        for image, other in zip(found, expected * 5, strict=True):
            assert image.equal(other)


def test_where_an_image_goes():
    assert fitted((480, 640), (224, 224)) == (168, 224, 28, 0)
    assert fitted((56, 40), (224, 224)) == (224, 160, 0, 32)
    assert fitted((1, 9999), (224, 224))[0] == 1
    white = seen(np.full((20, 40, 3), 255, np.uint8), (56, 56), "lerobot")
    torch.testing.assert_close(white[:, 14:42], torch.ones(3, 28, 56))
    assert white[:, :14].eq(-1).all()
    assert white[:, 42:].eq(-1).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"image=\[4, 4\]: must be \[height, width, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), "must be .height, width, 3."),
        (np.zeros((2, 3, 4, 4), np.uint8), "must be .height, width, 3."),
        (np.zeros((0, 4, 3), np.uint8), "must be .height, width, 3."),
        (np.zeros((4, 4, 3), np.int64), "must be uint8, or floats from 0 to 1"),
        (np.full((4, 4, 3), 255.0), "image='255 to 255': floats must be from 0 to 1"),
        (np.full((4, 4, 3), np.nan), "floats must be from 0 to 1"),
        (np.full((4, 4, 3), 1.0011), "1.0011 to 1.0011': floats must be from 0 to 1"),
        (np.array([["a"]]), "must be an array or an image"),
        (np.array([[None]]), "must be an array or an image"),
        ("base.png", "image='str': must be an array or an image"),
        (torch.zeros(3, 4, 4).to_sparse(), "must be an array or an image"),
        (torch.zeros(3, 4, 4, device="meta"), "must be an array or an image"),
        (torch.zeros(3, 4, 4, dtype=torch.float8_e4m3fn), "must be uint8, or floats"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(InvalidRequest, match=message):
        seen(image, (56, 56), "lerobot")


@pytest.mark.parametrize("rule", ["lerobot", "openpi"])
def test_floats_a_little_out_of_range_are_clipped(rule):
    dice = np.random.default_rng(0)
    image = dice.choice(np.array([0, 1], np.float32), (56, 56, 3))
    near = image + dice.choice(np.array([-1e-3, 0, 1e-3], np.float32), image.shape)
    for size in ((56, 56), (28, 28)):
        expected = seen(image, size, rule)
        found = seen(np.clip(near, -1e-3, 1.001), size, rule)
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
        assert found.abs().max() <= 1


def test_floats_become_bytes_as_openpis_server_cuts_them():
    found = seen(np.full((56, 56, 3), 0.999, np.float32), (56, 56), "openpi")
    torch.testing.assert_close(found, torch.full_like(found, 254 / 255 * 2 - 1))


# -- normalising ---------------------------------------------------------------------------------


@pytest.mark.parametrize("openpi", [False, True])
@pytest.mark.parametrize("mode", ["QUANTILES", "MEAN_STD", "MIN_MAX", "QUANTILE10"])
def test_what_is_normalised_comes_back(mode, openpi):
    low, high = np.array([-1.0, 0.0, 2.0]), np.array([1.0, 4.0, 2.5])
    names = ("mean", "std", "q01", "q99", "q10", "q90", "min", "max")
    normalizer = Normalizer("x", mode, {n: (low, high)[i % 2] for i, n in enumerate(names)}, openpi)
    x = np.array([[0.5, 1.0, 2.25]], np.float64 if openpi else np.float32)
    y = normalizer.forward(x)
    expected = (x - low) / high if mode == "MEAN_STD" else 2 * (x - low) / (high - low) - 1
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(normalizer.inverse(y), x, atol=1e-6)
    more = np.concatenate([y, [[7.0]]], -1)
    assert normalizer.inverse(more)[0, 3] == 7


def test_a_range_of_zero():
    same = {"q01": np.ones(1), "q99": np.ones(1)}
    x = np.ones(1, np.float32)
    assert Normalizer("x", "QUANTILES", same).forward(x).tolist() == [-1]
    assert Normalizer("x", "QUANTILES", same).inverse(np.zeros(1, np.float32)).tolist() == [1]
    assert Normalizer("x", "QUANTILES", same, openpi=True).forward(x + 1e-6)[0] > 0.5


def test_statistics_that_lack_what_is_needed():
    with pytest.raises(WeightsError, match="of action lack q01, q99, which QUANTILES needs"):
        Normalizer("action", "QUANTILES", {"mean": np.zeros(1), "std": np.ones(1)})
    with pytest.raises(WeightsError, match="must be finite"):
        Normalizer("action", "MEAN_STD", {"mean": np.zeros(1), "std": np.array([np.nan])})


def test_without_statistics_there_are_no_robot_units():
    base = Processor.from_folder(FULL, policy_config(FULL))
    found = base.prepare({"base_0_rgb": np.zeros((9, 9, 3), np.uint8)}, [0.5] * 32, "go")
    assert found.normalised.tolist() == [0.5] * 32
    assert "statistics: none" in base.assumed
    with pytest.raises(InvalidRequest, match=r"raw=False: .* no statistics of actions"):
        base.check_robot_units()
    table = {"q01": [0.0] * 32, "q99": [1.0] * 32}
    known = Processor.from_folder(
        FULL, policy_config(FULL), statistics={"state": table, "actions": table}
    )
    known.check_robot_units()
    assert known.finish(np.zeros((50, 32), np.float32), found.state).max() == 0.5


def test_statistics_from_everywhere(processor, tmp_path):
    file = TINY / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    tensors = load_file(file)
    table = {
        new: {k: tensors[f"{old}.{k}"].tolist() for k in ("q01", "q99", "mean", "std")}
        for old, new in (("observation.state", "state"), ("action", "actions"))
    }
    (tmp_path / "assets" / "x").mkdir(parents=True)
    path = tmp_path / "assets" / "x" / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": table}))
    expected = processor.of_state.statistics["q01"]
    for given in (file, path, str(tmp_path), table, TINY, {"norm_stats": table}):
        found = read_statistics(given)
        np.testing.assert_allclose(found.state["q01"], expected)
        assert len(found.action["q99"]) == 7
    assert "processor files" in processor.assumed
    for wrong in ({}, {"norm_stats": 3}, {"state": {"q01": "x"}}, tmp_path / "none.json"):
        with pytest.raises(WeightsError, match="statistics"):
            read_statistics(wrong)


def test_a_state_file_that_is_missing(tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    next(tmp_path.glob("policy_postprocessor_step_*")).unlink()
    with pytest.raises(WeightsError, match=r"there is no .*unnormalizer_processor"):
        Processor.from_folder(tmp_path, policy_config(tmp_path))


@pytest.mark.parametrize(
    ("step", "config", "message"),
    [
        ("normalizer_processor", {"eps": "x"}, "eps='x': must be a number above 0"),
        ("tokenizer_processor", {"max_length": "x"}, "max_length='x': must be an integer"),
        ("rename_observations_processor", {"rename_map": [1]}, "cannot use the processor files"),
        ("relative_actions_processor", {"exclude_joints": "gripper"}, "must be a list of names"),
    ],
)
def test_processor_files_that_are_wrong(step, config, message, tmp_path):
    steps = [{"registry_name": step, "config": config}]
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    with pytest.raises(WeightsError, match=message):
        read_processors(tmp_path)


def test_a_step_that_says_nothing(tmp_path):
    steps = [{"registry_name": name, "config": None} for name in ("tokenizer_processor", "x")]
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    assert read_processors(tmp_path) == Processors()


def test_no_tokenizer(tmp_path, processor):
    with pytest.raises(WeightsError, match=r"has no tokenizer .* takes the folder"):
        Processor.from_folder(tmp_path, processor.config)
    found = Processor.from_folder(tmp_path, processor.config, tokenizer=TINY / "tokenizer")
    assert found.tokenizer.bos == 2


def test_statistics_of_another_robot(processor):
    table = {"q01": [0.0] * 14, "q99": [1.0] * 14}
    with pytest.raises(WeightsError, match="statistics of 14 action dims, for a policy of 7"):
        Processor.from_folder(TINY, processor.config, statistics={"actions": table})


# -- relative actions ----------------------------------------------------------------------------


def test_which_actions_are_relative():
    names = ("joint_0", "Left_Gripper", "wrist")
    assert relative_mask(3, ("gripper",), names).tolist() == [True, False, True]
    assert relative_mask(3, ("gripper",)).tolist() == [True] * 3
    assert relative_mask(3, (), names).tolist() == [True] * 3


def test_relative_actions_are_added_to_the_state_and_taken_off_again(processor):
    config = replace(processor.config, use_relative_actions=True)
    relative = Processor(config, processor.tokenizer, statistics=TINY)
    assert relative.relative.tolist() == [True] * 6 + [False]
    chunk = np.random.default_rng(0).normal(size=(10, 32)).astype(np.float32)
    state = np.arange(8, dtype=np.float32)
    base = processor.finish(chunk, state)
    found = relative.finish(chunk, state)
    np.testing.assert_allclose(found - base, [[0, 1, 2, 3, 4, 5, 0]] * 10, atol=1e-6)
    assert found.dtype == np.float32
    back = relative.previous(found[4:], state, 8)
    np.testing.assert_allclose(back[:6], chunk[4:, :7], atol=1e-5)
    assert back[6:].tolist() == [back[5].tolist()] * 2


def test_an_empty_list_of_excluded_joints_excludes_none(processor):
    config = replace(processor.config, action_feature_names=("gripper", *"abcdef"))
    for exclude, first in ((None, False), ((), True)):
        processors = Processors(relative=True, exclude=exclude)
        found = Processor(config, processor.tokenizer, processors)
        assert found.relative.tolist() == [first] + [True] * 6


# -- what is asked of an observation -------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {}}, "there is none; at least one of base_0_rgb"),
        ({"images": {"top": 0}}, "there is no camera top; at least one of"),
        ({"state": None}, "robot_state=None: is missing"),
        ({"state": [0.0] * 7}, "robot_state='7 numbers': must be 8 numbers"),
        ({"state": [float("nan")] * 8}, "must be finite"),
        ({"state": ["a"] * 8}, "must be numbers"),
        ({"state": np.zeros((2, 4))}, "must have one dimension"),
        ({"state": torch.zeros(8).to_sparse()}, "must be numbers"),
        ({"state": torch.zeros(8, device="meta")}, "must be numbers"),
        ({"task": None}, "the task is missing"),
        ({"task": "\ud800"}, "must be Unicode text"),
    ],
)
def test_what_is_missing_is_told(change, message, goldens, processor):
    with pytest.raises(InvalidRequest, match=message):
        processor.prepare(**{**goldens.observation(0), **change})


def test_cameras_are_put_in_the_policys_order(goldens, processor):
    observation = goldens.observation(0)
    found = processor.prepare(**observation)
    observation["images"] = dict(reversed(observation["images"].items()))
    observation["images"]["left_wrist_0_rgb"] = None
    other = processor.prepare(**observation)
    assert other.cameras == ("base_0_rgb", "right_wrist_0_rgb")
    assert other.images.equal(found.images[[0, 2]])


def test_a_tokenizer_of_another_model(processor):
    with pytest.raises(WeightsError, match="the tokenizer has 512 ids, and the policy 100"):
        Processor(replace(processor.config, vocab_size=100), processor.tokenizer)
    assert Pi05Config().vocab_size > processor.tokenizer.size
