"""pi0.5 through the Engine: the published results, alone and in company; what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from threading import Thread

import numpy as np
import pytest
import torch
from pi05_data import TINY, asked, check_alone_and_together
from safetensors.torch import load_file, save_file

from mstar import Engine, InvalidRequest, WeightsError

IMAGE = np.zeros((48, 64, 3), np.uint8)
ASKED = {
    "text": "go",
    "images": {"base_0_rgb": IMAGE},
    "robot_state": [0.0] * 8,
}
LEFT = np.zeros((4, 7), np.float32)


@pytest.fixture(scope="module")
def engine():
    with Engine("pi05-tiny") as engine:
        yield engine


def test_every_golden_alone_and_all_of_them_at_once(engine, goldens):
    made = check_alone_and_together(engine, goldens, "step")
    assert made["batches"] < made["calls"]


def test_the_same_observation_and_seed_give_the_same_bits_on_any_thread(engine, goldens):
    request = asked(goldens, 0, noise=0)
    del request["noise"]
    expected = [engine.act(**{**request, "seed": seed}) for seed in range(4)]
    assert not np.array_equal(expected[0], expected[1])
    found: dict[tuple[int, int], np.ndarray] = {}

    def robot(index: int) -> None:
        for seed in range(4):
            found[index, seed] = engine.act(**{**request, "seed": seed})

    robots = [Thread(target=robot, args=(index,)) for index in range(4)]
    for thread in robots:
        thread.start()
    for thread in robots:
        thread.join()
    assert len(found) == 16
    for (_, seed), actions in found.items():
        assert np.array_equal(actions, expected[seed])


def test_the_tables_of_flows_are_kept_as_far_as_there_is_room(engine, monkeypatch):
    model, made = engine.model, []
    table = model.policy.table
    monkeypatch.setattr(model, "_tables", {})
    monkeypatch.setattr(model.policy, "table", lambda steps: made.append(steps) or table(steps))
    for steps in (10, 20, 10, 240, 10, 240, 300, 300, 10):
        assert model._table(steps).shape[0] == steps + 1
    assert made == [10, 20, 240, 300, 10]


def test_the_result_tells_what_it_is(engine, goldens):
    request = asked(goldens, 0, goldens.facts["pair"]["missing_cameras"])
    result = engine.generate(**request, output_modalities=("action",))
    assert (result.actions.dtype, result.actions.shape) == (np.float32, (10, 7))
    assert result.raw[0].metadata == {
        "cameras": ("base_0_rgb", "left_wrist_0_rgb"),
        "dtype": "float32",
        "shape": [10, 7],
    }
    assert result.usage.prompt_tokens == goldens.facts["pair"]["token_counts"][0]
    assert result.finish_reason == "stop"


def test_forms_of_noise_states_and_names(engine, goldens):
    request = asked(goldens, 0)
    rounded = torch.from_numpy(request["noise"]).bfloat16()
    state = np.array(request["robot_state"], np.float32)
    expected = engine.act(**{**request, "noise": rounded.float().numpy()})
    for change in (
        {"noise": rounded},
        {"noise": rounded.float().numpy().astype(">f4"), "robot_state": state.astype(">f4")},
        {"noise": rounded.tolist(), "robot_state": ", ".join(map(str, state.tolist()))},
        {
            "noise": rounded,
            "images": {f"observation.images.{k}": v for k, v in request["images"].items()},
        },
    ):
        assert np.array_equal(engine.act(**{**request, **change}), expected)


def test_images_in_a_list_are_those_of_the_cameras_in_order(engine, goldens):
    request = asked(goldens, 0)
    expected = engine.act(**request)
    images = list(request["images"].values())
    assert np.array_equal(engine.act(**{**request, "images": images}), expected)
    two = dict(list(request["images"].items())[:2])
    expected = engine.act(**{**request, "images": two})
    assert np.array_equal(engine.act(**{**request, "images": images[:2]}), expected)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("text", {"text": None}, "task is missing"),
        ("images", {"images": None}, "there is none; at least one of base_0_rgb, left_wrist"),
        ("images", {"images": {"base_0_rgb": None}}, "there is none"),
        ("images", {"images": [IMAGE] * 4}, "has 3 cameras: base_0_rgb"),
        ("images", {"images": {"head": IMAGE}}, "no camera head; at least one of base_0_rgb"),
        ("images.base_0_rgb", {"images": [IMAGE[..., 0]]}, r"\[48, 64\]: must be \[height"),
        ("images.base_0_rgb", {"images": [IMAGE.astype(int)]}, "int64.*must be uint8, or floats"),
        ("images.base_0_rgb", {"images": [IMAGE - 1.5]}, "-1.5 to -1.5.*floats must be from 0"),
        ("images.base_0_rgb", {"images": [b"no"]}, "2 bytes that are no image"),
        ("robot_state", {"robot_state": None}, "is missing"),
        ("robot_state", {"robot_state": [0.0] * 7}, "7 numbers.*must be 8 numbers"),
        ("robot_state", {"robot_state": [np.nan] * 8}, "must be finite"),
        ("robot_state", {"robot_state": ["a"] * 8}, "must be an array of numbers"),
        ("robot_state", {"robot_state": np.zeros((2, 8))}, "must have one dimension"),
        ("noise", {"noise": np.zeros((10, 31))}, r"\(10, 31\).*must be \(10, 32\)"),
        ("noise", {"noise": np.full((10, 32), np.inf)}, "must be finite"),
        ("num_steps", {"num_steps": 0}, "from 1 to 1000"),
        ("num_steps", {"num_steps": 2.5}, "from 1 to 1000"),
        ("seed", {"seed": -1}, "from 0"),
        ("raw", {"raw": "maybe"}, "true or false"),
        ("prev_chunk_left_over", {"prev_chunk_left_over": LEFT[0]}, r"must be \[rows, action"),
        ("prev_chunk_left_over", {"prev_chunk_left_over": np.zeros((4, 33))}, r"at most \[10, 32"),
        ("prev_chunk_left_over", {"prev_chunk_left_over": LEFT * np.nan}, "must be finite"),
        ("inference_delay", {"inference_delay": 2}, "goes with prev_chunk_left_over"),
        ("inference_delay", {"prev_chunk_left_over": LEFT, "inference_delay": 5}, "for 0 to 4"),
        ("inference_delay", {"prev_chunk_left_over": LEFT, "inference_delay": -1}, "at least 0"),
        (
            "prev_chunk_left_over",
            {"prev_chunk_left_over": LEFT[:2], "inference_delay": 3},
            "2 rows.*needs 3, the delay",
        ),
        ("execution_horizon", {"execution_horizon": 0}, "at least 1"),
        ("rtc_mode", {"rtc_mode": "x"}, "guided, trained"),
        ("prefix_attention_schedule", {"prefix_attention_schedule": "SQUARE"}, "LINEAR, EXP, ONES"),
        ("max_guidance_weight", {"max_guidance_weight": -1}, "from 0 to 1000"),
        ("output_modalities", {"output_modalities": ("text",)}, "has action only"),
        ("state", {"state": [0.0] * 8}, "did you mean 'robot_state'"),
        ("audio", {"audio": b"RIFF"}, "takes text, image only"),
        ("messages", {"text": None, "messages": [{"role": "user", "content": "go"}]}, "not chat"),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_is_queued(engine, field, change, message):
    before = engine.stats()["requests"]
    with pytest.raises(InvalidRequest, match=message) as caught:
        engine.generate(**{**ASKED, **change})
    assert caught.value.field == field
    assert engine.stats()["requests"] == before


# -- loading -------------------------------------------------------------------------------------


def copied(folder, *without: str):
    """The tiny checkpoint in a folder, but for some files."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns(*without))
    return folder


def test_one_line_tells_what_was_assumed(caplog):
    with caplog.at_level(logging.INFO, "mstar"), Engine("pi05-tiny"):
        pass
    (line,) = [record.getMessage() for record in caplog.records]
    for part in (
        "processor files",
        "QUANTILES",
        "resize rule: lerobot",
        "cameras: base_0_rgb, left_wrist_0_rgb, right_wrist_0_rgb",
        "8 state dims, in the prompt",
        "chunks of 10 x 7 actions",
    ):
        assert part in line


def test_a_missing_tensor_is_an_error(tmp_path):
    folder = copied(tmp_path / "policy", "model.safetensors")
    tensors = load_file(TINY / "model.safetensors")
    name = next(n for n in tensors if n.endswith("gemma_expert.model.layers.1.mlp.up_proj.weight"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj"):
        Engine("pi05", weights=folder)


def test_robot_units_need_statistics(tmp_path, goldens, engine):
    folder = copied(tmp_path / "policy", "policy_*")
    request = asked(goldens, 0)
    with Engine("pi05", weights=folder) as bare:
        with pytest.raises(InvalidRequest, match=r"no statistics.*\"statistics\".*or raw"):
            bare.generate(**request)
        policy = bare.policy()
        with pytest.raises(InvalidRequest, match="no statistics"):
            policy.infer(policy.example())
        assert policy.infer(policy.example(), raw=True)["actions"].shape == (10, 7)
        assert bare.act(**request, raw=True).shape == (10, 7)
        assert policy.warmup().keys() == {"first_s", "warm_s"}
    with Engine("pi05", weights=folder, options={"statistics": TINY}) as given:
        assert np.array_equal(given.act(**request), engine.act(**request))


def test_a_state_in_the_prompt_needs_statistics():
    wide = {"q01": [-10.0] * 7, "q99": [10.0] * 7}
    with Engine("pi05-tiny", options={"statistics": {"actions": wide}}) as engine:
        with pytest.raises(InvalidRequest, match=r"no statistics of the state .QUANTILES., which"):
            engine.act(**ASKED)
        assert engine.act(**ASKED, raw=True).shape == (10, 7)


def test_a_mode_of_normalisation_that_nobody_knows(tmp_path):
    folder = copied(tmp_path / "policy")
    file = folder / "policy_preprocessor.json"
    file.write_text(file.read_text().replace('"QUANTILES"', '"DECILES"'))
    with pytest.raises(WeightsError, match="norm_map: 'DECILES' must be one of IDENTITY, MEAN_STD"):
        Engine("pi05", weights=folder)


def test_statistics_as_an_argument():
    ones = {"q01": [-1.0] * 8, "q99": [1.0] * 8}
    wide = {"q01": [-10.0] * 7, "q99": [10.0] * 7}
    with Engine("pi05-tiny", options={"statistics": {"state": ones, "actions": wide}}) as engine:
        robot, raw = (engine.act(**ASKED, seed=1, raw=raw) for raw in (False, True))
    np.testing.assert_allclose(robot, 10 * raw, rtol=1e-5, atol=1e-5)


def test_a_policy_that_reads_no_state_in_the_prompt(caplog):
    with (
        caplog.at_level(logging.INFO, "mstar"),
        Engine("pi05-tiny", options={"state_in_prompt": False}) as engine,
    ):
        ids = [engine.model.processor.prepare(ASKED["images"], [x] * 8, "go").ids for x in (0, 1)]
    assert ids[0].equal(ids[1])
    assert "not in the prompt" in caplog.text


def test_a_hard_prefix_needs_a_policy_that_was_trained_for_it(tmp_path):
    folder = copied(tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rtc_training_max_delay": 0}))
    with Engine("pi05", weights=folder) as engine:
        for delay in (0, 2):
            left = {"prev_chunk_left_over": LEFT, "inference_delay": delay}
            with pytest.raises(InvalidRequest, match="rtc_mode='trained': the policy was not"):
                engine.act(**ASKED, **left, rtc_mode="trained")
        assert engine.act(**ASKED, **left).shape == (10, 7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"statistic": 1}, InvalidRequest, "pi05 has statistics, tokenizer, resize"),
        ({"resize": "nearest"}, InvalidRequest, "one of lerobot, openpi"),
        ({"horizon": "15"}, InvalidRequest, "horizon='15': must be an integer of at least 1"),
        ({"state_padded_prompt": "no"}, InvalidRequest, "must be true or false"),
        ({"state_in_prompt": 0}, InvalidRequest, "state_in_prompt=0: must be true or false"),
        ({"statistics": 5}, WeightsError, "statistics=5: must be a file, a folder, or what"),
        (
            {"statistics": {"state": {"q01": [0.0] * 9, "q99": [1.0] * 9}}},
            WeightsError,
            "9 state dims, for a policy of 8",
        ),
        ({"statistics": {"state": {"q01": [0.0] * 8}}}, WeightsError, "lack q99"),
        ({"statistics": {"arm": {}}}, WeightsError, "no statistics in an argument"),
        ({"statistics": "/nowhere.json"}, WeightsError, r"cannot read statistics from /nowhere"),
        (
            {"statistics": {"actions": {"q01": [0.0] * 9, "q99": [1.0] * 9}}},
            WeightsError,
            "9 action dims, for a policy of 7",
        ),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        Engine("pi05-tiny", options=options)


def test_guidance_is_as_the_checkpoint_says_unless_asked_otherwise(tmp_path, goldens, engine):
    folder = copied(tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    habits = {"prefix_attention_schedule": "EXP", "execution_horizon": 6, "max_guidance_weight": 2}
    (folder / "config.json").write_text(json.dumps({**config, "rtc_config": habits}))
    left = goldens["rtc.prev_chunk_left_over"]
    request = asked(goldens, 0, prev_chunk_left_over=left, inference_delay=2, rtc_mode="guided")
    published = {"execution_horizon": 10, "max_guidance_weight": 10}
    with Engine("pi05", weights=folder) as other:
        assert np.array_equal(other.act(**request), engine.act(**request, **habits))
        request |= {**published, "prefix_attention_schedule": "LINEAR"}
        assert np.array_equal(other.act(**request), engine.act(**request))


def test_a_config_that_is_not_one(tmp_path):
    folder = copied(tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_visual_memory": True}))
    with pytest.raises(WeightsError, match="memory"):
        Engine("pi05", weights=folder)
