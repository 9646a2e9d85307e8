"""When requests start."""

import asyncio
import itertools
import time

import pytest

from mstar.bench.load import Load, arrivals, offer


def run(load, seconds=0.0):
    """The numbers of the requests, when they were due, and the most at a time."""
    started, running, most = [], 0, 0

    async def one(number, due):
        nonlocal running, most
        started.append((number, due))
        running += 1
        most = max(most, running)
        await asyncio.sleep(seconds)
        running -= 1

    asyncio.run(offer(load, one))
    return started, most


def test_arrivals_repeat_and_have_the_rate():
    first = list(itertools.islice(arrivals(50.0, 1), 5000))
    assert first == list(itertools.islice(arrivals(50.0, 1), 5000))
    assert first != list(itertools.islice(arrivals(50.0, 2), 5000))
    assert first == sorted(first)
    assert first[-1] == pytest.approx(100, rel=0.1)


def test_a_slot_takes_the_next_request_when_it_is_free():
    started, most = run(Load(concurrency=3, requests=10), 0.005)
    assert sorted(number for number, _ in started) == list(range(10))
    assert most == 3


def test_arrivals_do_not_wait_for_the_server():
    load = Load(None, rate=2000.0, requests=30, seed=4)
    started, most = run(load, 0.2)
    assert most == 30
    began = started[0][1] - next(arrivals(2000.0, 4))
    due = [at for _, at in started]
    assert due == pytest.approx([began + at for at in itertools.islice(arrivals(2000.0, 4), 30)])


@pytest.mark.parametrize("load", [Load(2, seconds=0.1), Load(None, rate=50.0, seconds=0.1)])
def test_after_the_duration_no_request_starts(load):
    began = time.perf_counter()
    started, _ = run(load, 0.01)
    assert started
    assert max(due for _, due in started) < began + 0.15


def test_an_exception_ends_the_load():
    running = []

    async def one(number, due):
        if number == 1:
            raise ZeroDivisionError
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            running.append(number)
            raise

    with pytest.raises(ZeroDivisionError):
        asyncio.run(offer(Load(3, requests=3), one))
    assert sorted(running) == [0, 2]
