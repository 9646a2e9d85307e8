"""Batches captured in a warm-up, with a recorder that runs the step instead of a GPU."""

from __future__ import annotations

import threading

import pytest
import torch

from mstar.engine.captured_batches import CapturedBatches
from tests.recording import replays


class Counted:
    """A step of rows that notes how many it was run on."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x, y):
        self.sizes.append(len(x))
        return 2 * x + y, x.sum(1)


@pytest.fixture
def step():
    return Counted()


@pytest.fixture
def batches(step):
    found = CapturedBatches(replays)
    found.capture(step, torch.ones(1, 3), torch.zeros(1, 3), most=3)
    step.sizes.clear()
    return found


def rows(count, width=3):
    x = torch.arange(count * width, dtype=torch.float32).view(count, width)
    return x, -x


def run(batches, step, *inputs, key=None):
    with batches.run(step, *inputs, key=key) as outputs:
        return [x.clone() for x in outputs]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_replayed_batch_is_that_of_the_step(batches, step, count):
    batches.capture(step, torch.ones(1, 3), torch.zeros(1, 3), most=4)  # nothing new
    assert len(batches) == 3
    for x, y in (rows(4), rows(count)):  # of the first one's rows nothing is left in the second's
        expected = Counted()(x, y)
        for found, want in zip(run(batches, step, x, y), expected, strict=True):
            assert torch.equal(found, want)
    assert set(step.sizes) <= {1, 2, 4}


@pytest.mark.parametrize("inputs", [rows(5), rows(1, 4), [x.double() for x in rows(1)]])
def test_other_shapes_run_as_they_are_and_are_not_captured(batches, step, inputs):
    assert torch.equal(run(batches, step, *inputs)[0], inputs[0])
    assert (step.sizes, len(batches)) == ([len(inputs[0])], 3)


def test_what_else_a_step_depends_on_is_in_the_key(batches, step):
    batches.capture(lambda x, y: (x + 1, y), *rows(1), most=1, key="more")
    assert run(batches, step, *rows(1), key="more")[0].tolist() == [[1.0, 2.0, 3.0]]
    assert run(batches, step, *rows(1), key="other")[0].tolist() == [[0.0, 1.0, 2.0]]
    assert len(batches) == 4


def test_without_a_recorder_nothing_is_captured(step):
    batches = CapturedBatches(None)
    batches.capture(step, *rows(1), most=8)
    assert (step.sizes, len(batches)) == ([], 0)
    run(batches, step, *rows(3))
    assert step.sizes == [3]


def test_outputs_stay_until_they_were_read(batches, step):
    """Another thread that replays the same batch waits for it."""
    begun, found = threading.Event(), []

    def other():
        begun.set()
        found.append(run(batches, step, *rows(4))[0])

    x, y = torch.ones(4, 3), torch.ones(4, 3)
    with batches.run(step, x, y) as (first, _):
        thread = threading.Thread(target=other)
        thread.start()
        assert begun.wait(60)
        assert not found
        assert torch.equal(first, 3 * x)
    thread.join(60)
    assert torch.equal(found[0], rows(4)[0])


def test_threads_that_replay_at_once_get_what_is_theirs(batches, step):
    wrong = []

    def work(value):
        for _ in range(50):
            x = torch.full((3, 3), float(value))
            if not torch.equal(run(batches, step, x, x)[0], 3 * x):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_after_an_error_the_next_batch_is_right(batches, step):
    with pytest.raises(RuntimeError, match="no room"), batches.run(step, *rows(2)):
        raise RuntimeError("no room to read it into")
    assert torch.equal(run(batches, step, *rows(2))[0], rows(2)[0])
