"""Robots' words, real-time chunking, the queue."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mstar.errors import InvalidRequest
from mstar.models.control.action_queue import ActionQueue, delay_steps, lengthened
from mstar.models.pi05.observation import flat
from mstar.models.pi05.robots import PRESETS, robot_of
from mstar.models.pi05.rtc import guidance_gains, padded, prefix_weights, trained

IMAGE = np.zeros((8, 8, 3), np.uint8)
LIBERO = {
    "observation/image": IMAGE,
    "observation/wrist_image": IMAGE,
    "observation/state": np.zeros(8),
    "prompt": "go",
}


# -- observations --------------------------------------------------------------------------------


def test_nested_and_flat_observations_are_the_same():
    nested = {"observation": {"image": 1, "state": {"x.y": 2}}, "prompt": "go", "none": None}
    expected = {"observation/image": 1, "observation/state/x/y": 2, "prompt": "go"}
    assert flat(nested) == expected
    assert flat({"observation.image": 1, "a": 3}, {"a": "b.c"}) == {
        "observation/image": 1,
        "b/c": 3,
    }


def test_an_observation_of_lerobot(processor):
    robot = robot_of(processor.config)
    observation = {
        "observation.images.base_0_rgb": IMAGE,
        "observation": {"images": {"right_wrist_0_rgb": IMAGE}},
        "observation.state": torch.zeros(1, 8, dtype=torch.bfloat16),
        "task": ["go"],
        "timestamp": 3,
    }
    found = robot.observe(observation)
    assert list(found.images) == ["base_0_rgb", "right_wrist_0_rgb"]
    assert (found.state.dtype, found.state.shape, found.prompt) == (np.float64, (8,), "go")


def test_the_only_camera_of_some_policies_of_lerobot(processor):
    config = replace(processor.config, cameras=("observation.image", "top"))
    assert list(robot_of(config).images.values()) == ["observation.image", "observation.images.top"]


def test_all_faults_are_in_one_message():
    wrong = {"observation/image": IMAGE, "observation/state": np.zeros(7), "observation/imgae": 1}
    with pytest.raises(InvalidRequest) as caught:
        PRESETS["libero"].observe(wrong)
    for part in (
        "observation/wrist_image is missing",
        "observation/state has 7 numbers, and must have 8",
        "prompt, the task, is missing",
        "nobody knows: observation/imgae",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 3}, "prompt is a int, and must be text"),
        ({"observation/state": "x"}, "must be numbers"),
        ({"observation/image": None}, "observation/image is missing"),
    ],
)
def test_a_fault(change, message):
    with pytest.raises(InvalidRequest, match=message):
        PRESETS["libero"].observe({**LIBERO, **change})


def test_prompts_of_bytes_and_by_default():
    assert PRESETS["libero"].observe({**LIBERO, "prompt": b"go"}).prompt == "go"
    robot = replace(PRESETS["libero"], default_prompt="stay")
    assert robot.observe({**LIBERO, "prompt": None}).prompt == "stay"


def test_cameras_of_aloha():
    robot, state = PRESETS["aloha"], np.zeros(14)
    known = {"cam_high": IMAGE, "cam_low": IMAGE}
    found = robot.observe({"state": state, "images": known, "prompt": "go"})
    assert list(found.images) == ["base_0_rgb"]
    with pytest.raises(InvalidRequest, match="images/cam_top is no camera of this robot"):
        robot.observe({"state": state, "images": {**known, "cam_top": IMAGE}, "prompt": "go"})
    with pytest.raises(InvalidRequest, match="there is no image: at least one of images/cam_high"):
        robot.observe({"state": state, "prompt": "go"})


# -- real-time chunking --------------------------------------------------------------------------


def test_gains_of_ten_steps():
    expected = [10, 9.111, 4.25, 2.762, 2.167, 2, 2.167, 2.762, 4.25, 9.111]
    assert guidance_gains(10) == pytest.approx(expected, abs=1e-3)
    assert max(guidance_gains(10, 3.0)) == 3


@pytest.mark.parametrize("delay", [0, 3, 9, -1])
def test_weights_end_at_the_execution_horizon(delay):
    for schedule in ("LINEAR", "EXP", "ONES", "ZEROS"):
        found = prefix_weights(10, delay, 6, schedule)
        assert len(found) == 10
        assert found[: max(0, min(delay, 6))] == [1.0] * max(0, min(delay, 6))
        assert found[6:] == [0.0] * 4
        assert sorted(found, reverse=True) == found
    with pytest.raises(InvalidRequest, match="schedule='STEPS': must be one of LINEAR"):
        prefix_weights(10, 1, 6, "STEPS")


def test_chunks_that_do_not_fit():
    with pytest.raises(InvalidRequest, match=r"\[11, 7\]: at most \[10, 32\]"):
        padded(torch.zeros(11, 7), 10, 32)
    arguments = {"max_delay": 4, "horizon": 10, "actions": 32}
    with pytest.raises(InvalidRequest, match="inference_delay=5: the policy was trained for 0 to"):
        trained(torch.zeros(6, 7), delay=5, **arguments)
    with pytest.raises(InvalidRequest, match="needs 4, the delay"):
        trained(torch.zeros(3, 7), delay=4, **arguments)
    with pytest.raises(InvalidRequest, match="must be finite"):
        trained(torch.full((6, 7), torch.nan), delay=2, **arguments)
    with pytest.raises(InvalidRequest, match="must be below the horizon"):
        trained(torch.zeros(3, 7), delay=3, max_delay=4, horizon=3, actions=32)


# -- the queue -----------------------------------------------------------------------------------


def rows(start, count=6):
    return np.arange(start, start + count, dtype=np.float32)[:, None]


def test_a_delay_is_never_longer_than_what_the_robot_did():
    for literal, first in ((False, 11), (True, 14)):
        queue = ActionQueue(literal=literal)
        queue.merge(rows(0), rows(0))
        queue.get()
        before = queue.index
        queue.get()
        skipped = queue.merge(rows(10), rows(10), delay=4, index_before=before)
        assert skipped == first - 10
        assert queue.get().tolist() == [first]


def test_a_queue_is_cleared():
    queue = ActionQueue()
    assert (queue.get(), queue.left_over(), len(queue), queue.index) == (None, None, 0, 0)
    queue.merge(rows(0), rows(100))
    queue.get()
    assert queue.left_over()[1][:, 0].tolist() == [101, 102, 103, 104, 105]
    queue.clear()
    assert (queue.get(), len(queue)) == (None, 0)


def test_delays():
    assert delay_steps(0.041, 50) == 3
    assert lengthened(rows(0, 2), 4)[:, 0].tolist() == [0, 1, 1, 1]
    assert len(lengthened(rows(0), 4)) == 4
    with pytest.raises(ValueError, match="without rows"):
        lengthened(rows(0, 0), 4)
