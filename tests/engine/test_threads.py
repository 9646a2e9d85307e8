"""CPU threads of our threads, and of nobody else's."""

import contextlib
import threading
import weakref

import torch

from mstar.engine.lane import Lane
from mstar.engine.threads import threads_for, use_threads
from tests.waiting import until


def in_a_thread(function):
    out = []
    thread = threading.Thread(target=lambda: out.append(function()))
    thread.start()
    thread.join()
    return out[0]


def test_a_thread_sets_its_own_number_and_no_others():
    before = torch.get_num_threads()

    def ours():
        use_threads(before + 1)
        return torch.get_num_threads()

    assert in_a_thread(ours) == before + 1
    assert torch.get_num_threads() == before
    assert in_a_thread(torch.get_num_threads) == before


def test_small_models_use_one_thread():
    assert threads_for(1 << 20) == 1
    assert threads_for(1 << 30) == torch.get_num_threads()


class Job:
    def run(self) -> None:
        pass


def test_a_lane_lets_go_of_what_it_has_done():
    lane, job = Lane("lane", contextlib.nullcontext), Job()
    alive = weakref.ref(job)
    lane.submit(job.run)
    del job
    until(lambda: alive() is None)
    lane.close()
