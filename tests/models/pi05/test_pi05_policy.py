"""A policy as robot programs call it: conventions, forms of observations, deadlines."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pi05_data import TINY, picture

from mstar import DeadlineExceeded, Engine, InvalidRequest, RequestCancelled, Robot
from mstar.models.pi05.robots import PRESETS, robot_for

KEYS = {
    "base_0_rgb": "observation.images.base_0_rgb",
    "left_wrist_0_rgb": "observation.images.left_wrist_0_rgb",
    "right_wrist_0_rgb": "observation.images.right_wrist_0_rgb",
}


@pytest.fixture(scope="module")
def engine():
    with Engine("pi05-tiny") as engine:
        yield engine


@pytest.fixture
def policy(engine):
    return engine.policy()


@pytest.fixture
def seen(goldens):
    """An observation in lerobot's words, with two cameras as in the goldens."""
    found = goldens.observation(0, goldens.facts["pair"]["missing_cameras"])
    images = {KEYS[camera]: image for camera, image in found["images"].items()}
    return {**images, "observation.state": found["state"], "task": found["task"]}


def expect(found, expected, near=5e-5):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=near, rtol=0)


# -- openpi's robots -----------------------------------------------------------------------------


def of_openpi(folder, robot, statistics):
    """The tiny policy as openpi would have saved it for a robot."""
    shutil.copytree(TINY / "tokenizer", folder / "tokenizer")
    (folder / "model.safetensors").symlink_to(TINY / "model.safetensors")
    custom = json.loads((TINY / "config.json").read_text())["custom_dims"]
    config = {"action_horizon": 10, "action_dim": 32, "custom_dims": custom}
    more = {"image_resolution": [56, 56], "discrete_state_input": True}
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    assets = folder / "assets" / robot
    assets.mkdir(parents=True)
    (assets / "norm_stats.json").write_text(json.dumps(statistics))
    return folder


def of_robot(facts, robot):
    """The observation of a golden case, with its images."""
    found = dict(facts["openpi"][robot]["obs"])
    if robot == "libero":
        return {k: picture(v) if "image" in k else v for k, v in found.items()}
    if robot == "droid":
        base, wrist = "observation/exterior_image_1_left", "observation/wrist_image_left"
        pixels = picture("obs0_left_wrist_0_rgb.png").transpose(2, 0, 1)
        return {**found, base: picture(found[base]), wrist: pixels.astype(np.float32) / 255}
    files = {"cam_high": "obs0_base_0_rgb.png", "cam_right_wrist": "obs1_right_wrist_0_rgb.png"}
    return {**found, "images": {k: picture(v).transpose(2, 0, 1) for k, v in files.items()}}


@pytest.mark.parametrize(("name", "fps"), [("libero", None), ("droid", 15), ("aloha", 50)])
def test_robots_of_openpi(name, fps, tmp_path, goldens):
    facts = goldens.facts
    folder = of_openpi(tmp_path, name, facts["openpi"]["norm_stats"][name])
    observation = of_robot(facts, name)
    with Engine("pi05", weights=folder) as engine:
        policy = engine.policy(name)
        noise = goldens["openpi.noise"]
        found = policy.infer(observation, noise=noise)
        expected = goldens[f"openpi.{name}.actions"]
        expect(found["actions"], expected)
        assert list(found) == facts["openpi"][name]["response_keys"]
        assert found["policy_timing"]["infer_ms"] > 0
        again = [policy.begin(observation, noise=noise) for _ in range(3)]
        for pending in again:
            assert np.array_equal(pending.result().actions, found["actions"])
        metadata = policy.metadata
        assert (metadata["robot"], metadata["fps"]) == (name, fps)
        assert (metadata["action_horizon"], metadata["action_dim"]) == tuple(expected.shape)
        assert policy.infer(policy.example(), seed=0)["actions"].shape == expected.shape


def test_actions_that_are_deltas_go_on_from_another_state(tmp_path, goldens):
    folder = of_openpi(tmp_path, "aloha", goldens.facts["openpi"]["norm_stats"]["aloha"])
    observation = of_robot(goldens.facts, "aloha")
    with Engine("pi05", weights=folder) as engine:
        policy = engine.policy("aloha")
        chunk = policy.begin(observation, seed=1).result()
        moved = {**observation, "state": np.array(observation["state"]) + 0.1}
        left = policy.previous(chunk.original[3:], chunk.state, moved, 10)
        assert left.shape == chunk.original.shape
        assert np.array_equal(left[-4:], np.repeat(left[-1:], 4, 0))
        now = policy.robot.observe(moved).state
        found = policy.for_robot(left, now)[:7]
        np.testing.assert_allclose(found, chunk.actions[3:], atol=1e-4)


def test_a_robot_that_the_policy_was_not_made_for(engine):
    with pytest.raises(InvalidRequest, match="takes 14 numbers an action; the policy makes 7"):
        engine.policy("aloha")
    with pytest.raises(InvalidRequest, match="has cameras head; the policy has base_0_rgb"):
        engine.policy(Robot("own", images={"head": "head"}, state={"q": 8}))
    with pytest.raises(InvalidRequest, match="must be one of droid, libero, aloha, or a Robot"):
        engine.policy("spot")


@pytest.mark.parametrize(
    ("robot", "field", "message"),
    [
        (3, "robot", "must be one of droid, libero, aloha, or a Robot, or a map of its fields"),
        ({}, "robot", "must be one of droid"),
        ({"preset": "spot"}, "robot", "must be one of droid"),
        (
            {"preset": "droid", "camera": 1},
            "robot.camera",
            "unknown; there are preset, adapt, name",
        ),
        ({"state": {"q": 8}}, "robot.images", "must have a camera"),
        ({"images": ["front"]}, "robot.images", "must be a map from names to names"),
        ({"images": {"base_0_rgb": "x"}, "state": {"q": "8"}}, "robot.state", "or None for any"),
        ({"preset": "droid", "delta": "joints"}, "robot.delta", "must be a list"),
        ({"preset": "droid", "delta": [[1], [2, 3]]}, "robot.delta", "a list of true and false"),
        ({"preset": "droid", "unused": [1]}, "robot.unused", "must be a list of names"),
        ({"preset": "droid", "prompt": 3}, "robot.prompt", "must be a name"),
        ({"preset": "droid", "encode_state": "f"}, "robot.encode_state", "must be a function, or"),
        ({"preset": "droid", "action_dim": 0}, "robot.action_dim", "must be at least 1"),
        ({"preset": "droid", "run": "8"}, "robot.run", "must be at least 1, or None"),
        ({"preset": "droid", "fps": "15"}, "robot.fps", "must be above 0"),
        ({"preset": "droid", "required": ["front"]}, "robot.required", "which has base_0_rgb"),
        ({"preset": "libero", "delta": [True] * 8}, "robot.delta", "at most 7, one an action"),
    ],
)
def test_maps_that_are_no_robot(robot, field, message, engine):
    with pytest.raises(InvalidRequest, match=message) as caught:
        engine.policy(robot)
    assert caught.value.field == field


def test_what_is_no_map_of_names(engine):
    with pytest.raises(InvalidRequest, match=r"rename=.*must be a map from names to names"):
        engine.policy(rename=["a"])


def test_deltas_of_a_preset_are_those_of_policies_of_openpi():
    aloha = PRESETS["aloha"]
    assert robot_for("aloha") == aloha
    assert robot_for("aloha", deltas=False) == replace(aloha, delta=())
    own = robot_for({"preset": "aloha", "delta": [True, False], "adapt": False}, deltas=False)
    assert (own.delta, own.encode_state, own.decode_actions) == ((True, False), None, None)
    assert own.images == aloha.images


def test_a_preset_on_a_policy_of_lerobot(engine):
    found = engine.policy({"preset": "libero", "fps": 10}).robot
    assert found == replace(PRESETS["libero"], fps=10)
    only = engine.policy({"preset": "libero", "images": {"base_0_rgb": "front"}}).robot
    assert only.required == ("base_0_rgb",)


def test_engines_without_actions_have_no_policy():
    with Engine("orpheus-tiny") as engine, pytest.raises(InvalidRequest, match="makes no actions"):
        engine.policy()


# -- observations --------------------------------------------------------------------------------


def test_an_observation_in_any_form(policy, seen, goldens):
    noise = goldens["pair.noise"][0]
    expected = policy.infer(seen, noise=noise)["actions"]
    expect(expected, goldens["pair.actions"][0])
    images = {k.rpartition(".")[2]: v for k, v in seen.items() if "images" in k}
    state, task = seen["observation.state"], seen["task"]
    rest = {"observation": {"state": np.array(state)}, "task": task}
    forms = {
        "nested": images,
        "torch": {k: torch.from_numpy(v) for k, v in images.items()},
        "channels first": {k: v.transpose(2, 0, 1) for k, v in images.items()},
        "batched": {k: torch.from_numpy(v.transpose(2, 0, 1))[None] for k, v in images.items()},
        "floats": {k: v / np.float32(255) for k, v in images.items()},
        "another byte order": {k: (v / np.float32(255)).astype(">f4") for k, v in images.items()},
        "read-only": {k: np.frombuffer(v.tobytes(), np.uint8).reshape(v.shape)
                      for k, v in images.items()},
    }  # fmt: skip
    for name, form in forms.items():
        given = {**rest, "observation": {**rest["observation"], "images": form}}
        found = policy.infer(given, noise=noise)["actions"]
        near = 5e-6 if np.asarray(next(iter(form.values()))).dtype.kind == "f" else 0
        np.testing.assert_allclose(found, expected, atol=near, rtol=0, err_msg=name)
    batched = {k: torch.as_tensor(np.array(v))[None] for k, v in seen.items() if k != "task"}
    found = policy.infer({**batched, "task": [task]}, noise=noise.numpy().tolist())["actions"]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (720, 1280), (56, 56), (57, 55)])
def test_images_of_any_size(size, policy, seen):
    seen[KEYS["base_0_rgb"]] = np.full((*size, 3), 90, np.uint8)
    assert np.isfinite(policy.infer(seen)["actions"]).all()


def test_a_robot_of_ones_own_with_names_of_ones_own(engine, policy, seen, goldens):
    noise = goldens["pair.noise"][0]
    expected = policy.infer(seen, noise=noise)["actions"]
    own = Robot(
        "arm",
        images={"base_0_rgb": "front", "left_wrist_0_rgb": "wrist"},
        state={"arm/joints": 7, "gripper": 1},
        prompt="instruction",
        action_dim=6,
        default_prompt=seen["task"],
        encode_state=lambda state: state / 2,
        decode_actions=lambda actions: -actions,
    )
    arm = engine.policy(own, rename={"cameras.f": "front", "cameras.w": "wrist"})
    state = 2 * np.array(seen["observation.state"])
    observation = {
        "cameras": {"f": seen[KEYS["base_0_rgb"]], "w": seen[KEYS["left_wrist_0_rgb"]]},
        "arm": {"joints": state[:7]},
        "gripper": float(state[7]),
    }
    found = arm.infer(observation, noise=noise)["actions"]
    assert np.array_equal(found, -expected[:, :6])
    fields = {name: value for name, value in vars(own).items() if value is not None}
    arm = engine.policy(fields, rename={"cameras.f": "front", "cameras.w": "wrist"})
    assert np.array_equal(arm.infer(observation, noise=noise)["actions"], found)
    raw = arm.infer(observation, noise=noise, raw=True)["actions"]
    expect(raw, goldens["pair.actions_norm"][0])


def test_keys_with_dots_are_those_of_nested_maps(engine, seen):
    fields = {"images": {"base_0_rgb": "camera.front"}, "state": {"arm.q": None, "grip": 1}}
    arm = engine.policy({**fields, "prompt": "language.task", "unused": ["camera.depth"]})
    nested = {
        "camera": {"front": seen[KEYS["base_0_rgb"]], "depth": np.zeros((4, 4))},
        "arm": {"q": seen["observation.state"][:7]},
        "grip": seen["observation.state"][7],
        "language": {"task": seen["task"]},
    }
    only = {k: v for k, v in seen.items() if "wrist" not in k}
    expected = engine.policy().infer(only, seed=1)["actions"]
    assert np.array_equal(arm.infer(nested, seed=1)["actions"], expected)
    assert [len(arm.example()[key]) for key in ("arm.q", "grip")] == [7, 1]
    assert arm.warmup().keys() == {"first_s", "warm_s"}


def test_a_state_with_fewer_numbers_than_actions_are_relative_to(engine, seen):
    fields = {"images": {"base_0_rgb": "front"}, "state": {"q": None}, "delta": [True] * 7}
    arm, image = engine.policy(fields), seen[KEYS["base_0_rgb"]]
    with pytest.raises(InvalidRequest, match="robot_state='6 numbers': 7 actions are relative"):
        arm.infer({"front": image, "q": np.zeros(6), "prompt": "go"})
    assert arm.infer({"front": image, "q": np.zeros(8), "prompt": "go"})["actions"].size == 70


def test_one_error_names_all_faults(policy):
    wrong = {
        "observation.images.base_0_rgb": np.zeros((8, 8), np.uint8),
        "observation.images.left_wrist_0_rgb": np.zeros((8, 8, 3), np.int32),
        "observation.images.head": np.zeros((8, 8, 3), np.uint8),
        "observation.state": [0.0] * 7,
        "taks": "go",
    }
    with pytest.raises(InvalidRequest) as caught:
        policy.infer(wrong)
    for part in (
        "base_0_rgb=[8, 8]: must be [height, width, 3] or [3, height, width]",
        "left_wrist_0_rgb='int32': must be uint8",
        "head is no camera of this robot",
        "observation.state has 7 numbers, and must have 8",
        "task, the task, is missing",
        "keys that nobody knows: taks",
    ):
        assert part in str(caught.value)
    assert caught.value.field == "observation"


# -- deadlines -----------------------------------------------------------------------------------


def test_a_deadline_that_is_kept_changes_nothing(policy, seen):
    expected = policy.infer(seen, seed=1)["actions"]
    found = policy.infer(seen, seed=np.int64(1), deadline_ms=np.float32(60_000))["actions"]
    assert np.array_equal(found, expected)


def test_a_deadline_that_is_missed_frees_the_engine_after_one_step(engine, policy, seen):
    policy.infer(seen)

    def steps():
        return engine.stats()["nodes"]["step"]["calls"]

    for _ in range(3):
        began = time.perf_counter()
        with pytest.raises(DeadlineExceeded, match="no actions within 60 ms"):
            policy.infer(seen, num_steps=1000, deadline_ms=60)
        assert time.perf_counter() - began < 1
        done = steps()
        policy.infer(seen)
        assert steps() - done <= 10 + 1  # those of the call, and the one that was running
    stats = engine.stats()["requests"]
    assert (stats["running"], stats["waiting"]) == (0, 0)


def test_a_deadline_that_nothing_can_keep(engine, policy, seen):
    with pytest.raises(DeadlineExceeded):
        policy.infer(seen, deadline_ms=1e-3)
    assert policy.infer(seen, deadline_ms=60_000)["actions"].shape == (10, 7)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "soon", True])
def test_what_is_no_deadline(value, policy, seen):
    with pytest.raises(InvalidRequest, match=r"deadline_ms=.*must be above 0"):
        policy.infer(seen, deadline_ms=value)


def test_what_was_begun_can_be_given_up(engine, policy, seen):
    pending = policy.begin(seen, num_steps=1000)
    pending.cancel()
    with pytest.raises(RequestCancelled):
        pending.result()
    pending = policy.begin(seen)
    assert pending.result().actions.shape == (10, 7)
    pending.cancel()


# -- lerobot's names -----------------------------------------------------------------------------


def batch_of(seen):
    images = {
        k: torch.from_numpy(v).permute(2, 0, 1)[None] / 255
        for k, v in seen.items()
        if "images" in k
    }
    state = torch.tensor(seen["observation.state"])[None]
    return {**images, "observation.state": state, "task": [seen["task"]], "index": torch.zeros(1)}


def test_select_action(policy, seen, goldens, engine):
    batch, noise = batch_of(seen), goldens["pair.noise"][:1]
    calls = goldens.facts["select_action"]["calls"]
    before = engine.stats()["nodes"]["read"]["calls"]
    rows = [policy.select_action(batch, noise=noise, raw=True) for _ in range(calls)]
    assert engine.stats()["nodes"]["read"]["calls"] - before == 2
    assert {row.shape for row in rows} == {(1, 7)}
    expect(np.concatenate(rows), goldens["select_action.sequence_norm"])
    policy.reset()
    expect(policy.select_action(batch, noise=noise), goldens["pair.actions"][0, :1])
    expect(policy.select_action(batch, noise=noise), goldens["pair.actions"][0, 1:2])
    assert engine.stats()["nodes"]["read"]["calls"] - before == 3


@pytest.fixture
def both(seen, goldens):
    """Two observations in a batch."""
    images = {key: np.stack([seen[key], seen[key][::-1]]) for key in seen if "images" in key}
    other = goldens.observation(1)
    states = [seen["observation.state"], other["state"]]
    return {**images, "observation.state": states, "task": [seen["task"], other["task"]]}


def test_batches_are_as_many_observations(policy, both):
    noise = np.random.default_rng(0).standard_normal((2, 10, 32)).astype(np.float32)
    rows = [{key: value[row] for key, value in both.items()} for row in range(2)]
    alone = [policy.infer(row, noise=x)["actions"] for row, x in zip(rows, noise, strict=True)]
    assert np.array_equal(policy.select_action(both, noise=noise), np.stack(alone)[:, 0])
    assert np.array_equal(policy.select_action(both, noise=noise), np.stack(alone)[:, 1])
    left = np.stack(alone)[:, 2:8]
    found = policy.predict_action_chunk(both, noise=noise, prev_chunk_left_over=left)
    one = policy.predict_action_chunk(rows[1], noise=noise[1], prev_chunk_left_over=left[1])
    assert np.array_equal(found[1:], one)
    shared = policy.predict_action_chunk({**both, "task": "wait"}, seed=1)
    assert shared.shape == (2, 10, 7)


def test_rows_of_what_nobody_knows_do_not_count(policy, both, seen):
    unknown = {"depth": np.zeros((5, 8, 8, 1)), "notes": ["a", "b", "c"]}
    for batch in (both, seen):
        expected = policy.predict_action_chunk(batch, seed=1)
        found = policy.predict_action_chunk({**batch, **unknown}, seed=1)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("wrong", "params", "says"),
    [
        ({"observation.state": [[0.0] * 8]}, {}, "observation/state='1 rows': must be 2, as of im"),
        ({}, {"noise": np.zeros((3, 10, 32))}, "noise='3 rows': must be 2, as of images"),
        ({}, {"prev_chunk_left_over": np.zeros((1, 5, 7))}, "over='1 rows': must be 2, as of im"),
        ({}, {"noise": [[1], [2, 3]]}, "noise=.*must be an array of numbers"),
    ],
)
def test_batches_of_which_rows_are_missing(wrong, params, says, policy, both):
    with pytest.raises(InvalidRequest, match=says):
        policy.predict_action_chunk({**both, **wrong}, **params)


def test_a_batch_with_a_fault_is_given_up_as_a_whole(policy, both, monkeypatch):
    given_up = []

    def begin(observation, **_):
        if observation["task"] == "fall":
            raise InvalidRequest("task", "fall", "is no task")
        return SimpleNamespace(cancel=lambda: given_up.append(observation["task"]))

    monkeypatch.setattr(policy, "begin", begin)
    with pytest.raises(InvalidRequest, match="is no task"):
        policy.select_action({**both, "task": ["stand", "fall"]})
    assert given_up == ["stand"]


def test_select_action_knows_no_real_time_chunking(policy, seen, goldens):
    with pytest.raises(InvalidRequest, match="is for predict_action_chunk"):
        policy.select_action(seen, prev_chunk_left_over=goldens["rtc.prev_chunk_left_over"])
    policy.config = replace(policy.config, rtc_config={"enabled": True})
    with pytest.raises(InvalidRequest, match="use PolicyRunner, or predict_action_chunk"):
        policy.select_action(seen)


def test_predict_action_chunk(policy, seen, goldens):
    batch, noise = batch_of(seen), goldens["pair.noise"][0]
    found = policy.predict_action_chunk(batch, noise=noise)
    expect(found, goldens["pair.actions_norm"][:1])
    facts = goldens.facts["rtc"]
    left = {
        "inference_delay": facts["inference_delay"],
        "prev_chunk_left_over": goldens["rtc.prev_chunk_left_over"],
        "noise": noise,
    }
    found = policy.predict_action_chunk(
        batch, **left, execution_horizon=facts["execution_horizon"], rtc_mode="guided"
    )
    expect(found, goldens["rtc.LINEAR.actions_norm"][..., :7], 2e-4)
    rows = left.pop("prev_chunk_left_over")
    for batched in (rows[None], rows[None].tolist()):
        found = policy.predict_action_chunk(batch, prev_chunk_left_over=batched, **left)
        expect(found, goldens["rtc_trained.actions_norm"][..., :7])
    for used_up in (rows[:0], rows[None, :0].numpy(), []):
        found = policy.predict_action_chunk(batch, prev_chunk_left_over=used_up, **left)
        expect(found, goldens["pair.actions_norm"][:1])


def test_relative_actions_go_on_from_another_state(policy, seen, monkeypatch):
    monkeypatch.setattr(policy.processor, "relative", np.array([True] * 6 + [False]))
    chunk = policy.begin(seen, seed=1).result()
    state = np.array(seen["observation.state"]) + 0.25
    moved = {**seen, "observation.state": state}
    left = policy.previous(chunk.original[4:], chunk.state, moved, 6)
    expect(policy.for_robot(left, state.astype(np.float32)), chunk.actions[4:], 1e-4)
    assert not np.allclose(left[:, :6], chunk.original[4:, :6], atol=1e-3)
    expect(left[:, 6], chunk.original[4:, 6], 1e-5)
