"""Planning in a control loop: the same runner as that of pi0.5."""

from __future__ import annotations

import numpy as np
import pytest
from vjepa2_ac_data import ARRAYS, SEARCHES, close

from mstar import Engine, InvalidRequest, PolicyRunner
from tests.waiting import until

CLIP, POSES = ARRAYS["frames_u8"], ARRAYS["poses"][0]
SEEN = {"image": CLIP[0], "state": POSES[0]}
QUICK = {"samples": 8, "topk": 4, "iterations": 2, "seed": 1}


@pytest.fixture(scope="module")
def engine():
    with Engine("vjepa2_ac-tiny", cpu_threads=1) as engine:
        yield engine


def test_a_plan_from_an_observation(engine):
    policy = engine.policy({"goal": CLIP[5], **SEARCHES["notebook"]})
    close(policy.infer(SEEN)["actions"], "cem_notebook/plan", 1e-5)
    assert policy.metadata["action_horizon"] == 2


def test_the_goal_is_in_the_observation_or_changed_on_the_way(engine):
    policy = engine.policy(QUICK, rename={"camera": "image"})
    with pytest.raises(InvalidRequest, match=r"observation\.goal"):
        policy.infer(SEEN)
    first = policy.infer({"camera": CLIP[0], "state": POSES[0], "goal": CLIP[5]})["actions"]
    policy.aim(CLIP[5])
    np.testing.assert_array_equal(policy.infer(SEEN)["actions"], first)
    policy.aim(engine.encode(CLIP[1]))
    assert not np.array_equal(policy.infer(SEEN)["actions"], first)


def test_a_runner_replans_after_every_action(engine):
    policy = engine.policy({"goal": CLIP[5], **QUICK})
    expected = policy.infer(SEEN)["actions"]
    with PolicyRunner(policy, fps=4, deadline_ms=60_000) as runner:
        for count in (1, 2):
            runner.notify(SEEN)
            until(lambda count=count: runner.stats["chunks"] == count)
            np.testing.assert_array_equal(runner.get_action(), expected[0])
            assert runner.get_action() is None
        runner.reset()
        assert runner.stats["failures"] == 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"topk": 1}, "topk"), ({"horizon": 9}, "horizon"), ({"what": 1}, "what"), ("droid", "robot")],
)
def test_wrong_settings_are_refused(engine, settings, field):
    with pytest.raises(InvalidRequest) as caught:
        engine.policy(settings)
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["image", "goal"])
def test_what_is_wrong_in_an_observation_is_called_as_there(engine, name):
    with pytest.raises(InvalidRequest, match=rf"observation\.{name}"):
        engine.policy(QUICK).infer({**SEEN, "goal": CLIP[5], name: POSES})


@pytest.mark.parametrize("name", ["image", "state"])
def test_an_observation_that_lacks_something_is_refused(engine, name):
    policy = engine.policy({"goal": CLIP[5], **QUICK})
    with pytest.raises(InvalidRequest, match=rf"observation\.{name}"):
        policy.infer({key: value for key, value in SEEN.items() if key != name})


def test_deadlines_and_names_that_make_no_sense_are_refused(engine):
    policy = engine.policy({"goal": CLIP[5], **QUICK})
    for value in ("soon", -1.0):
        with pytest.raises(InvalidRequest, match=r"deadline_ms=.*: must be above 0"):
            policy.infer(SEEN, deadline_ms=value)
    with pytest.raises(InvalidRequest, match="rename='image': must be a map from names to names"):
        engine.policy(QUICK, rename="image")


def test_a_planner_has_no_real_time_chunking(engine):
    with pytest.raises(InvalidRequest, match="makes every chunk anew"):
        PolicyRunner(engine.policy({"goal": CLIP[5], **QUICK}), fps=4, rtc=True)
