"""The control loop with the tiny policy: failures of its engine, and nothing that grows."""

from __future__ import annotations

import gc
import random
import resource
import threading
import time

import numpy as np
import pytest

from mstar import Engine, EngineClosed, InvalidRequest, PolicyRunner
from tests.waiting import until


@pytest.fixture(scope="module")
def engine():
    with Engine("pi05-tiny") as engine:
        yield engine


def test_an_engine_that_dies_is_noticed():
    engine = Engine("pi05-tiny")
    policy = engine.policy()
    with PolicyRunner(policy, 50) as runner:
        runner.notify(policy.example())
        until(lambda: runner.stats["chunks"] == 1)
        engine.close()
        while runner.get_action() is not None:
            pass
        runner.notify(policy.example())
        until(lambda: runner.stats["failures"] == 1)
        with pytest.raises(EngineClosed):
            runner.get_action()


def test_what_the_robot_does_wrong_surfaces_as_well(engine):
    policy = engine.policy()
    with PolicyRunner(policy, 50) as runner:
        runner.notify({"task": "go"})
        until(lambda: runner.stats["failures"] == 1)
        with pytest.raises(InvalidRequest, match=r"observation.state is missing"):
            runner.get_action()


@pytest.mark.parametrize("rtc", [None, "guided", "trained"])
def test_a_soak(rtc, engine):
    """Some hundred calls as fast as a robot could make them; nothing grows."""
    dice, policy = random.Random(7), engine.policy()
    images = np.random.default_rng(7).integers(0, 256, (4, 48, 64, 3), np.uint8)
    tasks = ("pick up the cup", "fold the towel", "go " * 40)
    threads = threading.active_count()

    def observation():
        cameras = dice.sample(list(policy.robot.images.values()), dice.randint(1, 3))
        return {
            **{camera: dice.choice(images) for camera in cameras},
            "observation.state": [dice.uniform(-1, 1) for _ in range(8)],
            "task": dice.choice(tasks),
        }

    with PolicyRunner(policy, 500, rtc=rtc) as runner:

        def go(calls):
            moved = 0
            for _ in range(calls):
                runner.notify(observation())
                action = runner.get_action()
                if action is not None:
                    assert action.shape == (7,)
                    assert np.isfinite(action).all()
                    moved += 1
                if dice.random() < 0.01:
                    runner.reset()
                time.sleep(0.001)
            gc.collect()
            return moved, len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        _, objects, memory = go(150)
        moved, objects_after, memory_after = go(550)
        assert moved > 100
        assert objects_after - objects < 500
        assert memory_after - memory < 16 << 10  # KiB
        stats = runner.stats
        assert stats["observations"] == 700
        assert stats["failures"] == stats["deadline_misses"] == 0
        assert stats["chunks"] + stats["stale_chunks"] <= stats["inferences"] <= 700
    assert threading.active_count() == threads
    requests = engine.stats()["requests"]
    assert (requests["running"], requests["waiting"], requests["failed"]) == (0, 0, 0)


def test_prompts_are_not_kept(engine):
    """A cache of them would be 10 MB after so many."""
    tokenizer, dice = engine.model.processor.tokenizer, np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for state in dice.uniform(-1, 1, (4000, 8)):
        tokenizer.with_state("pick up the cup", state)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 << 10  # KiB
