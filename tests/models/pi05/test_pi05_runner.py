"""A policy in a control loop: a fake one, whose inferences end when the test says so."""

from __future__ import annotations

import gc
import queue
import threading
import time
import traceback
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from mstar import DeadlineExceeded, InvalidRequest, PolicyRunner
from mstar.models.control.action_queue import lengthened
from mstar.models.control.pending import Chunk
from tests.waiting import until

ROWS = 10


class Fake:
    """Row `i` of the chunk of observation `n` is `[n, i]`. `ends` tells how inferences end: with a
    chunk after so many seconds of the virtual clock, or with an error."""

    def __init__(self, max_delay=0, run=None):
        self.config = SimpleNamespace(
            chunk_size=ROWS,
            n_action_steps=8,
            rtc_training_max_delay=max_delay,
            rtc={"execution_horizon": 10},
        )
        self.robot = SimpleNamespace(run=run)
        self.now = 0.0
        self.begun: queue.Queue = queue.Queue()
        self.ends: queue.Queue = queue.Queue()
        self.cancelled = self.resets = 0

    def begin(self, obs, *, deadline_ms=None, **params):
        self.begun.put((obs, params, deadline_ms))
        return SimpleNamespace(result=lambda: self.result(obs), cancel=self.cancel)

    def result(self, obs):
        end = self.ends.get(timeout=10)
        if isinstance(end, BaseException):
            raise end
        self.now += end
        rows = np.stack([np.full(ROWS, obs), np.arange(ROWS)], 1).astype(np.float32)
        return Chunk(rows - 1000, rows, np.zeros(2), 1e3 * end)

    def cancel(self):
        self.cancelled += 1

    def previous(self, left, then, obs, rows):
        return lengthened(left, rows)

    def reset(self):
        self.resets += 1


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def run(fake):
    """A runner for the fake one, closed at the end."""
    runners = []

    def make(policy=fake, fps=10, **options):
        runners.append(PolicyRunner(policy, fps, clock=lambda: policy.now, **options))
        return runners[-1]

    yield make
    for runner in runners:
        fake.ends.put(0.0)
        runner.policy.ends.put(0.0)
        runner.close()


def feed(runner, obs, seconds=0.0):
    """An observation, and an inference from it that takes so long; what it was given."""
    policy, before = runner.policy, runner.stats["inferences"]
    runner.notify(obs)
    found = policy.begun.get(timeout=10)
    assert found[0] == obs
    policy.ends.put(seconds)
    until(lambda: runner.stats["inferences"] > before)
    return found[1]


def rows(runner, count):
    return [tuple(runner.get_action()) for _ in range(count)]


# -- actions -------------------------------------------------------------------------------------


def test_before_the_first_chunk_there_is_nothing_and_nobody_starves(run):
    runner = run()
    assert [runner.get_action() for _ in range(3)] == [None] * 3
    assert runner.stats["starvations"] == 0


def test_rows_come_in_order_and_then_starvation_counts(run):
    runner = run(execution_horizon=4)
    feed(runner, 1)
    assert rows(runner, 4) == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert runner.get_action() is None
    assert runner.get_action() is None
    stats = runner.stats
    assert (stats["actions"], stats["starvations"], stats["chunks"]) == (4, 2, 1)


def test_the_next_chunk_is_inferred_when_few_rows_are_left(run, fake):
    runner = run(execution_horizon=4, queue_threshold=1)
    feed(runner, 1)
    runner.notify(2)
    rows(runner, 2)
    assert fake.begun.empty()
    rows(runner, 1)
    assert fake.begun.get(timeout=10)[0] == 2
    fake.ends.put(0.0)
    until(lambda: runner.stats["chunks"] == 2)
    assert rows(runner, 3) == [(1, 3), (2, 0), (2, 1)]


def test_the_latest_observation_wins_and_is_used_once(run, fake):
    runner = run(queue_threshold=10)
    runner.notify(1)
    assert fake.begun.get(timeout=10)[0] == 1
    for obs in (2, 3, 4):
        runner.notify(obs)
    fake.ends.put(0.0)
    assert fake.begun.get(timeout=10)[0] == 4
    fake.ends.put(0.0)
    until(lambda: runner.stats["inferences"] == 2)
    runner.get_action()
    assert fake.begun.empty()
    assert runner.stats["observations"] == 4


def test_nothing_waits_for_an_inference(run, fake):
    runner = run(execution_horizon=4, queue_threshold=4)
    feed(runner, 1)
    runner.notify(2)
    fake.begun.get(timeout=10)
    longest = 0.0
    for call in (runner.get_action, lambda: runner.notify(3), lambda: runner.stats) * 200:
        began = time.perf_counter()
        call()
        longest = max(longest, time.perf_counter() - began)
    assert longest < 0.1  # the inference has not even ended
    assert fake.begun.empty()


# -- failures and resets -------------------------------------------------------------------------


def test_a_failure_surfaces_and_ends_the_actions_until_a_reset(run, fake):
    runner = run(queue_threshold=10)
    feed(runner, 1)
    feed(runner, 2, ValueError("a wire is loose"))
    for _ in range(3):
        with pytest.raises(ValueError, match="a wire is loose") as caught:
            runner.get_action()
    assert "in result" in "".join(traceback.format_exception(caught.value))
    runner.notify(3)
    with pytest.raises(ValueError, match="loose"):
        runner.get_action()
    assert fake.begun.empty()
    assert runner.stats["failures"] == 1
    runner.reset()
    assert runner.get_action() is None
    feed(runner, 4)
    assert rows(runner, 2) == [(4, 0), (4, 1)]


def test_a_reset_drops_actions_and_a_chunk_that_comes_later(run, fake):
    runner = run(queue_threshold=10)
    feed(runner, 1)
    runner.notify(2)
    fake.begun.get(timeout=10)
    runner.reset()
    assert (fake.cancelled, fake.resets) == (1, 1)
    assert runner.get_action() is None
    fake.ends.put(0.0)  # it was too late to cancel it
    until(lambda: runner.stats["inferences"] == 2)
    assert runner.get_action() is None
    assert runner.stats["stale_chunks"] == 1
    assert runner.stats["starvations"] == 0
    feed(runner, 3)
    assert rows(runner, 1) == [(3, 0)]


def test_a_failure_of_what_was_reset_is_of_no_interest(run, fake):
    runner = run()
    runner.notify(1)
    fake.begun.get(timeout=10)
    runner.reset()
    fake.ends.put(ValueError("too late"))
    until(lambda: runner.stats["inferences"] == 1)
    assert runner.get_action() is None
    assert runner.stats["failures"] == 0


def test_an_observation_from_before_a_reset_is_forgotten(run, fake):
    runner = run(queue_threshold=10)
    runner.notify(1)
    fake.begun.get(timeout=10)
    runner.notify(2)
    runner.reset()
    fake.ends.put(0.0)
    until(lambda: runner.stats["inferences"] == 1)
    assert fake.begun.empty()


def test_a_missed_deadline_is_counted_and_the_next_observation_has_its_turn(run, fake):
    runner = run(deadline_ms=5, queue_threshold=10)
    runner.notify(1)
    assert fake.begun.get(timeout=10)[2] == 5
    fake.ends.put(DeadlineExceeded("late"))
    until(lambda: runner.stats["deadline_misses"] == 1)
    assert runner.get_action() is None
    feed(runner, 2)
    assert rows(runner, 1) == [(2, 0)]


# -- real-time chunking --------------------------------------------------------------------------


def test_a_chunk_goes_on_where_the_last_one_is(run, fake):
    runner = run(rtc=True, execution_horizon=8, queue_threshold=10)
    assert runner.rtc == "guided"
    assert feed(runner, 1, 30.0) == {}  # cold: no row is skipped, and no delay learnt from it
    assert rows(runner, 3) == [(1, 0), (1, 1), (1, 2)]
    asked = feed(runner, 2, 0.2)
    left = asked.pop("prev_chunk_left_over")
    assert left[:, 1].tolist() == [-997, -996, -995, -994, -993, -992, -991, -991]
    assert asked == {"inference_delay": 0, "execution_horizon": 8, "rtc_mode": "guided"}
    assert rows(runner, 1) == [(2, 0)]  # two steps late, but the robot has moved none
    assert feed(runner, 3)["inference_delay"] == 2


def test_rows_that_the_robot_has_taken_meanwhile_are_skipped(run, fake):
    runner = run(rtc="guided", queue_threshold=10)
    feed(runner, 1)
    runner.notify(2)
    fake.begun.get(timeout=10)
    assert rows(runner, 3) == [(1, 0), (1, 1), (1, 2)]
    fake.ends.put(0.2)
    until(lambda: runner.stats["chunks"] == 2)
    assert rows(runner, 1) == [(2, 2)]


def test_literally_as_many_rows_are_skipped_as_were_measured(run):
    runner = run(rtc="guided", literal=True, queue_threshold=10)
    feed(runner, 1, 0.3)
    assert rows(runner, 1) == [(1, 3)]
    feed(runner, 2, 5.0)
    assert runner.get_action() is None
    assert runner.stats["stale_chunks"] == 1
    assert feed(runner, 3) == {}  # nothing to go on from


def test_literally_what_is_left_is_lengthened_with_zeros(run):
    runner = run(rtc="guided", literal=True, queue_threshold=ROWS - 1)
    feed(runner, 1, 0.1)
    rows(runner, ROWS - 4)
    asked = feed(runner, 2, 0.1)
    assert asked["inference_delay"] == 1  # of the first inference
    left = asked["prev_chunk_left_over"]
    assert left.shape == (runner.execution_horizon, 2)
    assert left[:3, 1].tolist() == [ROWS - 1003, ROWS - 1002, ROWS - 1001]
    assert not left[3:].any()


def test_the_longest_of_the_recent_latencies_is_expected(run, monkeypatch):
    monkeypatch.setattr("mstar.models.control.runner._RECENT", 2)
    runner = run(rtc="guided", queue_threshold=ROWS)
    asked = [feed(runner, obs, end) for obs, end in enumerate((8.0, 0.5, 0.125, 0.25, 0.0))]
    assert [each.get("inference_delay") for each in asked] == [None, 0, 5, 5, 3]


def test_trained_delays_are_no_longer_than_those_trained_for():
    policy = Fake(max_delay=2)
    with PolicyRunner(policy, 10, rtc=True, queue_threshold=10, clock=lambda: policy.now) as runner:
        assert runner.rtc == "trained"
        for obs in range(3):
            feed(runner, obs, 0.9)
        asked = feed(runner, 4)
        assert (asked["rtc_mode"], asked["inference_delay"]) == ("trained", 2)


# -- numbers, and the end ------------------------------------------------------------------------


def test_latencies_are_those_of_warm_inferences(run):
    runner = run(queue_threshold=10)
    assert runner.stats["latency_ms"] == dict.fromkeys(("p50", "p95", "p99", "max"))
    for obs, seconds in enumerate((9.0, *[0.01] * 98, 0.02, 0.5)):
        feed(runner, obs, seconds)
        while runner.get_action() is not None:
            pass
    found = runner.stats["latency_ms"]
    assert found["p50"] == pytest.approx(10)
    assert found["p95"] == pytest.approx(10)
    assert 10 < found["p99"] < 500
    assert found["max"] == pytest.approx(500)
    assert runner.stats["inferences"] == 101


def test_usual_numbers_of_rows(run):
    assert (run().execution_horizon, run().queue_threshold) == (8, 4)
    assert run(Fake(run=5)).execution_horizon == 5
    runner = run(rtc=True)
    assert (runner.execution_horizon, runner.queue_threshold) == (6, 6)
    habitual = Fake()
    habitual.config.rtc = {"execution_horizon": 4}
    assert run(habitual, rtc=True).execution_horizon == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps=0: must be above 0"),
        ({"execution_horizon": 11}, "must be from 1 to 10"),
        ({"queue_threshold": -1}, "must be from 0 to 10"),
        ({"rtc": "fast"}, "guided, trained, True or None"),
        ({"rtc": "trained"}, "was not trained for it"),
        ({"deadline_ms": -1}, "deadline_ms=-1: must be above 0"),
        ({"raw": True}, "raw=True: is up to the runner"),
        ({"rtc_mode": "guided"}, "rtc_mode='guided': is up to the runner; see rtc"),
    ],
)
def test_arguments_that_do_not_fit(options, message, fake):
    before = threading.active_count()
    with pytest.raises(InvalidRequest, match=message):
        PolicyRunner(fake, **{"fps": 10, **options})
    assert threading.active_count() == before


def test_closing_ends_the_thread_and_gives_up_what_runs(fake):
    before = threading.active_count()
    runner = PolicyRunner(fake, 10)
    assert threading.active_count() == before + 1
    runner.notify(1)
    fake.begun.get(timeout=10)
    threading.Timer(0.01, fake.ends.put, [0.0]).start()
    runner.close()
    runner.close()
    assert fake.cancelled == 1
    until(lambda: threading.active_count() == before)
    assert runner.get_action() is None


def test_a_closed_runner_hands_out_no_rows(run):
    runner = run()
    feed(runner, 1)
    assert rows(runner, 1) == [(1, 0)]
    runner.close()
    runner.notify(2)
    assert runner.get_action() is None
    assert runner.stats["starvations"] == 0


def test_a_runner_that_nobody_holds_ends_its_thread(fake):
    before = threading.active_count()
    runner = weakref.ref(PolicyRunner(fake, np.float32(10)))
    until(lambda: gc.collect() is not None and runner() is None)
    until(lambda: threading.active_count() == before)
