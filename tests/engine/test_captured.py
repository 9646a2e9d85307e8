"""Steps captured by bucket, with a recorder that runs the step instead of a GPU."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mstar.engine.captured import CapturedSteps, graph_bytes, record
from tests.recording import replays

CPU = torch.device("cpu")


@pytest.fixture
def steps():
    with torch.inference_mode():
        yield CapturedSteps(replays, CPU)


def scaled(factor, seen=None):
    def step(x, y):
        if seen is not None:
            seen.append((tuple(x.shape), factor))
        return (factor * x + y,)

    return step


def test_a_replay_reads_what_is_given_now(steps):
    for value in (1.0, 2.0, 3.0):
        x = torch.full((3,), value)
        (found,) = steps.run(scaled(2), x, x + 1)
        assert found.tolist() == [3 * value + 1] * 3
        x.zero_()  # it is the caller's again
    assert len(steps) == 1


def test_a_bucket_is_the_key_and_the_form_of_every_input(steps):
    x, seen = torch.ones(3), []
    for key in (2, 3):
        assert steps.run(scaled(key, seen), x, x, key=key)[0].tolist() == [key + 1.0] * 3
    one = torch.ones(1)
    assert steps.run(scaled(2, seen), one, one, key=2)[0].tolist() == [3.0]
    ints = one.int()
    assert steps.run(scaled(2, seen), ints, ints, key=2)[0].dtype == torch.int32
    assert len(steps) == 4
    # What was captured stays, whatever comes as the step.
    assert steps.run(scaled(100), x, x, key=2)[0].tolist() == [3.0] * 3


def test_outputs_are_where_they_were(steps):
    x = torch.ones(3)
    (first,) = steps.run(scaled(2), x, x)
    (second,) = steps.run(scaled(2), 2 * x, x)
    assert second.data_ptr() == first.data_ptr()


def test_further_buckets_run_as_they_are():
    steps = CapturedSteps(replays, CPU, most=1)
    for size in (1, 2, 1, 3):
        x = torch.ones(size)
        assert steps.run(scaled(2), x, x)[0].tolist() == [3.0] * size
    assert len(steps) == 1


def test_without_a_recorder_steps_run_as_they_are():
    steps, seen = CapturedSteps(None, CPU), []
    x = torch.ones(2)
    for _ in range(2):
        assert steps.run(scaled(2, seen), x, x)[0].tolist() == [3.0, 3.0]
    assert (len(seen), len(steps)) == (2, 0)


def test_a_capture_that_fails_leaves_no_bucket():
    def fails(step):
        raise RuntimeError("no memory")

    steps, x = CapturedSteps(fails, CPU), torch.ones(2)
    with pytest.raises(RuntimeError, match="no memory"):
        steps.run(scaled(2), x, x)
    assert len(steps) == 0


class FakeCuda:
    """Stands for `torch.cuda`: which stream a step is run and captured on."""

    def __init__(self):
        self.made, self.now, self.log, self.capturing = [], ["main"], [], 0
        self.stream = self.on
        self.device, self.reserved = 0, 1000

    def current_device(self):
        return self.device

    def memory_reserved(self):
        return self.reserved

    def graph_pool_handle(self):
        return "memory"

    def current_stream(self):
        return FakeStream(self.now[-1])

    def Stream(self):
        self.made.append(f"side {len(self.made)}")
        return FakeStream(self.made[-1])

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: None)

    @contextmanager
    def on(self, stream):
        self.now.append(stream.name)
        yield
        self.now.pop()

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.capturing += 1
        assert (self.capturing, pool, capture_error_mode) == (1, "memory", "thread_local")
        self.reserved -= 100  # a capture begins with empty caches
        with self.on(stream):
            yield
        self.capturing -= 1


class FakeStream:
    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        assert other.name != self.name


def test_all_captures_of_a_recorder_are_on_one_stream_of_their_own(monkeypatch):
    """torch's own stream for captures is one of the process: it may be another GPU's."""
    cuda = FakeCuda()
    monkeypatch.setattr("torch.cuda", cuda)
    capture = record()
    assert cuda.made == []  # the device is known when the first step is captured
    for _ in range(3):
        capture(lambda: cuda.log.append(cuda.now[-1]))
    assert cuda.log == ["side 0"] * 9
    record()(lambda: cuda.log.append(cuda.now[-1]))
    assert cuda.log[9:] == ["side 1"] * 3


def test_memory_of_graphs_is_what_captures_reserve_as_long_as_they_live(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr("torch.cuda", cuda)
    growth = []

    def step():
        if cuda.capturing:
            cuda.reserved += growth.pop(0)

    captures = []
    for cuda.device, growth in ((0, [70, 0, 5]), (0, [3]), (1, [40])):
        captures.append(record())
        while growth:
            captures[-1](step)
    here, there = torch.device("cuda:0"), torch.device("cuda:1")
    assert (graph_bytes(here), graph_bytes(there)) == (78, 40)
    assert graph_bytes(torch.device("cuda")) == 40  # the current one
    del captures[0]
    assert graph_bytes(here) == 3


def test_one_thread_captures_at_a_time(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr("torch.cuda", cuda)
    inside, go_on, failures = threading.Event(), threading.Event(), []

    def first():
        if cuda.capturing:
            inside.set()
            go_on.wait(60)

    def work(step):
        try:
            record()(step)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(step,)) for step in (first, lambda: None)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert not failures


@pytest.mark.gpu
def test_graphs_replay_on_a_gpu():
    device = torch.device("cuda")
    with torch.inference_mode():
        steps = CapturedSteps(record(), device)
        for size in (4, 2, 4, 2):
            x = torch.rand(size)
            (found,) = steps.run(scaled(2), x, x)
            torch.testing.assert_close(found.cpu(), 3 * x)
    assert len(steps) == 2
