from __future__ import annotations

import threading

import pytest
from walks import outcomes, results, settle

from mstar.engine.node import Node
from mstar.engine.runtime import Runtime


def batches_of(payloads, **options):
    """The batches that a node makes of calls that arrive together."""
    batches = []
    node = Node("node", lambda batch: batches.append(list(batch)) or batch, **options)

    async def walk(payload):
        return await node(payload)

    assert results(*map(walk, payloads)) == list(payloads)
    return batches


def test_a_batch_has_at_most_max_batch_calls_oldest_first():
    assert batches_of(range(5), max_batch=2) == [[0, 1], [2, 3], [4]]


def test_the_costs_in_a_batch_add_up_to_at_most_max_cost():
    cost = {"cost": lambda x: x, "max_cost": 10}
    assert batches_of([4, 4, 4, 2, 8, 8], **cost) == [[4, 4], [4, 2], [8], [8]]


def test_one_call_always_fits():
    assert batches_of([3, 99, 3, 3], cost=lambda x: x, max_cost=10) == [[3], [99], [3, 3]]


def test_only_calls_of_equal_key_share_a_batch_and_the_oldest_goes_first():
    key = {"key": lambda x: x % 3}
    assert batches_of([1, 2, 4, 3, 5, 7], **key) == [[1, 4, 7], [2, 5], [3]]
    assert batches_of([1, 2, 4, 7, 5], max_batch=2, **key) == [[1, 4], [2, 5], [7]]


@pytest.mark.parametrize("options", [{}, {"key": lambda x: x[0]}])
def test_withdrawn_calls_are_passed_over_and_do_not_hold_up_others(options):
    batches = []
    node = Node("node", lambda batch: batches.append(list(batch)) or batch, **options)
    runtime = Runtime()

    async def walk(payload):
        await node(payload)

    tasks = [runtime.spawn(walk(p)) for p in ("a1", "b1", "a2", "c1")]
    runtime._run_tasks()
    assert node.waiting == 4
    tasks[0].withdraw()
    tasks[2].withdraw()
    assert node.waiting == 2
    settle(runtime)
    assert sorted(p for batch in batches for p in batch) == ["b1", "c1"]
    assert [task.done for task in tasks] == [True] * 4
    assert not node.has_calls()


@pytest.mark.parametrize("option", ["key", "cost"])
def test_an_error_in_key_or_cost_fails_only_the_call_it_is_asked_about(option):
    def ask(payload):
        return 10 // payload

    options = {"key": ask} if option == "key" else {"cost": ask, "max_cost": 20}
    node = Node("node", lambda batch: batch, **options)

    async def walk(x):
        return await node(x)

    ends = outcomes(*(walk(x) for x in (1, 0, 1)))
    assert [end.value for end in ends] == [1, None, 1]
    assert isinstance(ends[1].error, ZeroDivisionError)


def test_limits_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="max_batch=0"):
        Node("node", list, max_batch=0)
    with pytest.raises(ValueError, match="go together"):
        Node("node", list, max_cost=3)


def test_waiting_may_be_asked_from_another_thread_while_calls_come_and_go():
    node = Node("node", lambda batch: batch, key=lambda x: x % 50, max_batch=4)
    errors, done = [], threading.Event()

    def ask():
        while not done.is_set():
            try:
                assert node.waiting >= 0
            except Exception as error:
                errors.append(error)
                return

    async def walk(x):
        for i in range(20):
            await node(x + i)

    thread = threading.Thread(target=ask)
    thread.start()
    results(*(walk(x) for x in range(200)))
    done.set()
    thread.join()
    assert errors == []
