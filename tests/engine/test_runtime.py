from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time

import pytest
from walks import Gate, Outcome, outcomes, results, resume, settle

from mstar.engine.channel import Channel
from mstar.engine.node import Node
from mstar.engine.runtime import Runtime
from mstar.engine.traps import gather, sleep, spawn


def recording(name="node", **options):
    """A node that doubles numbers, and the batches it ran."""
    batches = []

    def run(batch):
        batches.append(list(batch))
        return [2 * x for x in batch]

    return Node(name, run, **options), batches


# -- calls and batches ---------------------------------------------------------------------------


def test_calls_of_many_walks_share_a_batch_and_each_gets_its_own_result():
    node, batches = recording()

    async def walk(x):
        return await node(x), await node(x + 10)

    assert results(*(walk(x) for x in range(3))) == [(0, 20), (2, 22), (4, 24)]
    assert batches == [[0, 1, 2], [10, 11, 12]]
    assert node.batch_sizes == {3: 2}


def test_nodes_take_turns():
    order = []
    nodes = [Node(n, lambda b, n=n: order.append(n) or b, max_batch=1) for n in "ab"]

    async def walk(node):
        await node(0)

    results(*(walk(nodes[i % 2]) for i in range(6)))
    assert order == list("ababab")


def test_only_the_guilty_call_of_a_batch_fails():
    batches = []

    def run(batch):
        batches.append(list(batch))
        if 3 in batch:
            raise ValueError("three")
        return batch

    node = Node("node", run)

    async def walk(x):
        return await node(x)

    ends = outcomes(*(walk(x) for x in range(5)))
    assert [end.value for end in ends] == [0, 1, 2, None, 4]
    assert str(ends[3].error) == "three"
    assert batches == [[0, 1, 2, 3, 4], [0], [1], [2], [3], [4]]


def test_a_batch_that_is_too_large_for_memory_is_halved_until_it_fits():
    sizes = []

    def run(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise MemoryError
        return batch

    node = Node("node", run)

    async def walk(x):
        return await node(x)

    assert results(*(walk(x) for x in range(8))) == list(range(8))
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


def test_one_call_that_never_fits_into_memory_fails_alone():
    def run(batch):
        if 2 in batch:
            raise MemoryError("too much")
        return batch

    node = Node("node", run)

    async def walk(x):
        return await node(x)

    ends = outcomes(*(walk(x) for x in range(5)))
    assert [isinstance(end.error, MemoryError) for end in ends] == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_a_node_that_returns_too_few_results_is_an_error_that_names_it():
    node = Node("codec", lambda batch: batch[1:])

    async def walk():
        return await node(1)

    (end,) = outcomes(walk())
    assert "codec returned 0 results for 1 calls" in str(end.error)


def test_a_call_can_be_awaited_only_once():
    node, _ = recording()

    async def walk():
        call = node(1)
        await call
        await call

    (end,) = outcomes(walk())
    assert "node was awaited twice" in str(end.error)


def test_awaiting_something_foreign_is_a_type_error_in_the_walk_which_may_go_on():
    node, _ = recording()

    async def walk():
        with pytest.raises(TypeError, match="cannot wait for"):
            await asyncio.sleep(0)
        return await node(4)

    assert results(walk()) == [8]


# -- gather --------------------------------------------------------------------------------------


def test_gather_returns_results_in_order_whatever_order_they_come_in():
    fast, _ = recording("fast")
    slow, _ = recording("slow")

    async def twice(x):
        return await slow(await slow(x))

    async def walk():
        return await gather(twice(1), fast(2), twice(3), gather(fast(4), twice(5)), gather())

    assert results(walk()) == [[4, 4, 12, [8, 20], []]]


def test_gather_of_nothing_is_an_empty_list():
    async def walk():
        return await gather()

    assert results(walk()) == [[]]


def test_gather_takes_tasks_and_other_awaitables():
    node, _ = recording()

    async def child(x):
        return await node(x)

    async def numbers():
        yield await node(7)

    async def walk():
        task = spawn(child(1))
        return await gather(task, task, numbers().__anext__())

    assert results(walk()) == [[2, 2, 14]]


def test_the_first_failure_of_a_gather_withdraws_queued_calls_and_closes_coroutines():
    events = []
    gate = Gate()

    def fail(batch):
        raise ValueError("bad")

    bad = Node("bad", fail)
    late, batches = recording("late")

    async def child():
        try:
            await gate.wait()
        finally:
            events.append("closed")

    async def walk():
        try:
            await gather(bad(1), late(2), child(), sleep(60))
        except ValueError as error:
            events.append(str(error))
        return "on"

    assert results(walk()) == ["on"]
    assert events == ["closed", "bad"]
    assert batches == []
    assert gate.waiters == []


def test_a_gather_that_cannot_begin_ends_what_it_began():
    node, batches = recording()

    async def child():
        await node(2)

    async def never():
        raise AssertionError

    async def walk():
        with pytest.raises(TypeError, match="cannot wait for a int"):
            await gather(node(1), child(), 5, never())
        return await node(3)

    assert results(walk()) == [6]
    assert batches == [[3]]


def test_the_same_call_twice_in_a_gather_is_an_error_not_a_hang():
    node, batches = recording()

    async def walk():
        call = node(1)
        with pytest.raises(RuntimeError, match="awaited twice"):
            await gather(call, call)

    results(walk())
    assert batches == []


def test_an_error_in_a_child_of_a_gather_comes_out_of_it():
    node, _ = recording()

    async def child(x):
        await node(x)
        raise KeyError(x)

    async def walk():
        await gather(child(1), child(2))

    (end,) = outcomes(walk())
    assert end.error.args == (1,)


# -- spawn ---------------------------------------------------------------------------------------


def test_a_task_can_be_awaited_twice_and_by_several():
    node, _ = recording()

    async def child():
        return await node(21)

    async def other(task):
        return await task

    async def walk():
        task = spawn(child())
        again = spawn(other(task))
        return await task, await task, await again

    assert results(walk()) == [(42, 42, 42)]


def test_children_and_grandchildren_end_with_their_parent():
    gate, closed = Gate(), []

    async def grandchild():
        try:
            await gate.wait()
        finally:
            closed.append("grandchild")

    async def child():
        try:
            spawn(grandchild())
            await gate.wait()
        finally:
            closed.append("child")

    node, _ = recording()

    async def walk():
        spawn(child())
        await node(1)
        await node(1)

    results(walk())
    assert closed == ["grandchild", "child"]
    assert gate.waiters == []


def test_an_error_that_nobody_awaits_is_raised_in_the_parent():
    gate = Gate()

    async def child():
        raise KeyError("child")

    async def walk():
        spawn(child())
        try:
            await gate.wait()
        except KeyError:
            return "caught"

    assert results(walk()) == ["caught"]
    assert gate.waiters == []


def test_an_awaited_error_is_raised_where_it_is_awaited_every_time():
    async def child():
        raise KeyError("child")

    async def walk():
        task = spawn(child())
        for _ in range(2):
            with pytest.raises(KeyError):
                await task
        return "on"

    assert results(walk()) == ["on"]


def test_awaiting_a_task_that_was_ended_is_an_error_not_a_hang():
    gate = Gate()
    tasks = []

    async def child():
        await gate.wait()

    async def parent():
        tasks.append(spawn(child()))
        await node(1)
        await node(1)

    async def stranger():
        await node(1)
        await tasks[0]

    node, _ = recording()
    first, second = outcomes(parent(), stranger())
    assert first.error is None
    assert "ended before it was done" in str(second.error)


def test_spawn_is_for_use_inside_a_walk_and_takes_a_coroutine():
    async def child():
        pass

    with pytest.raises(RuntimeError, match="inside a walk"):
        spawn(child())
    node, _ = recording()
    with pytest.raises(TypeError, match="takes a coroutine, not a Call"):
        spawn(node(1))


def test_an_error_that_nobody_could_hear_of_is_logged(caplog):
    async def walk():
        raise KeyError("lost")

    runtime = Runtime()
    with caplog.at_level(logging.ERROR, "mstar"):
        runtime.spawn(walk())
        settle(runtime)
    assert "lost" in caplog.text


# -- ending and interrupting ---------------------------------------------------------------------


def parked_on(kind, node, closed):
    """A walk that is suspended on one kind of trap until it is ended."""

    async def child():
        try:
            await Gate().wait()
        finally:
            closed.append("child")

    async def walk():
        channel, full = Channel(), Channel(capacity=1)
        full.send(0)
        try:
            if kind == "call":
                await node(1)
            elif kind == "gather":
                await gather(node(1), child(), gather(node(2)))
            elif kind == "read":
                await channel.__anext__()
            elif kind == "write":
                await full.put(1)
            elif kind == "sleep":
                await sleep(60)
            elif kind == "task":
                await spawn(child())
            elif kind == "nested":
                async for _ in numbers():
                    pass
        finally:
            closed.append("walk")
            assert not channel._readers
            assert not full._writers

    async def numbers():
        try:
            yield await Gate().wait()
        finally:
            closed.append("generator")

    return walk()


KINDS = {
    "call": ["walk"],
    "gather": ["child", "walk"],
    "read": ["walk"],
    "write": ["walk"],
    "sleep": ["walk"],
    "task": ["child", "walk"],
    "nested": ["generator", "walk"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["withdraw", "interrupt"])
def test_ending_a_walk_runs_its_finally_blocks_whatever_it_waits_for(kind, how):
    runtime, node, closed, end = Runtime(), Node("never", lambda batch: 1 / 0), [], Outcome()
    task = runtime.spawn(parked_on(kind, node, closed), waiter=end)
    resume(runtime)
    if how == "withdraw":
        task.withdraw()
        assert end.told == 0
    else:
        task.interrupt(KeyError("stop"))
        resume(runtime)
        assert isinstance(end.error, KeyError)
    assert sorted(closed) == KINDS[kind]
    settle(runtime)
    assert task.done
    assert end.told == (how == "interrupt")
    assert node.batch_sizes == {}
    assert node.waiting == 0


def test_a_task_that_is_interrupted_when_it_is_already_ready_sees_the_error_once():
    """And what it waited for before does not resume what it waits for next."""
    gate, log = Gate(), []
    node, _ = recording()

    async def walk():
        try:
            log.append(await gate.wait())
        except KeyError:
            log.append("interrupted")
        log.append(await node(1))
        log.append(await node(2))

    runtime, end = Runtime(), Outcome()
    task = runtime.spawn(walk(), waiter=end)
    settle(runtime)
    gate.open("value")
    task.interrupt(KeyError())
    task.interrupt(ValueError())
    settle(runtime)
    assert log == ["interrupted", 2, 4]
    assert (end.told, end.error) == (1, None)


def test_a_task_that_is_interrupted_before_it_began_never_begins():
    async def walk():
        raise AssertionError

    runtime, end = Runtime(), Outcome()
    runtime.spawn(walk(), waiter=end).interrupt(KeyError("early"))
    settle(runtime)
    assert isinstance(end.error, KeyError)


def test_interrupting_or_ending_what_has_ended_does_nothing():
    async def walk():
        return 1

    runtime, end = Runtime(), Outcome()
    task = runtime.spawn(walk(), waiter=end)
    settle(runtime)
    task.interrupt(KeyError())
    task.withdraw()
    settle(runtime)
    assert (end.value, end.told, task.error) == (1, 1, None)


def test_an_exception_in_a_finally_block_replaces_the_error_and_one_while_ending_is_logged(caplog):
    gate = Gate()

    async def walk():
        try:
            await gate.wait()
        finally:
            raise ValueError("from finally")

    runtime, end = Runtime(), Outcome()
    task = runtime.spawn(walk(), waiter=end)
    settle(runtime)
    task.interrupt(KeyError())
    settle(runtime)
    assert str(end.error) == "from finally"
    task = runtime.spawn(walk(), waiter=end)
    settle(runtime)
    with caplog.at_level(logging.ERROR, "mstar"):
        task.withdraw()
    assert "from finally" in caplog.text
    assert gate.waiters == []


def test_a_walk_that_awaits_while_it_is_ended_is_cut_off(caplog):
    gate = Gate()

    async def walk():
        try:
            await gate.wait()
        finally:
            await gate.wait()

    runtime = Runtime()
    task = runtime.spawn(walk())
    settle(runtime)
    with caplog.at_level(logging.ERROR, "mstar"):
        task.withdraw()
    assert "ignored GeneratorExit" in caplog.text
    assert gate.waiters == []


def test_nothing_keeps_ended_tasks_alive():
    node, _ = recording()

    async def child():
        await node(1)

    async def walk():
        spawn(child())
        await gather(child(), node(2))
        await sleep(0)

    runtime = Runtime()
    ends = [Outcome(), Outcome()]
    for end in ends:
        runtime.spawn(walk(), waiter=end)
    while not all(end.told for end in ends):
        settle(runtime)
        runtime._run_timers()
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o).__name__ == "Task" and o.runtime is runtime]


# -- time and threads ----------------------------------------------------------------------------


def serve(runtime):
    thread = threading.Thread(target=runtime.run)
    thread.start()
    return thread


def test_sleeping_walks_wake_in_the_order_of_their_times_and_others_go_on():
    order = []
    node, _ = recording()

    async def sleeper(seconds):
        await sleep(seconds)
        order.append(seconds)

    async def walk():
        branches = gather(sleeper(0.02), sleeper(0.0), sleeper(0.01))
        task = spawn(waiting(branches))
        order.append(await node(1))
        await task
        runtime.stop()

    async def waiting(branches):
        await branches

    runtime = Runtime()
    runtime.spawn(walk())
    runtime.run()
    assert order == [2, 0.0, 0.01, 0.02]


def test_a_cancelled_timer_is_not_called():
    runtime, called = Runtime(), []
    timer = runtime.call_later(0.0, called.append, 1)
    runtime.call_later(0.001, called.append, 2)
    runtime.call_later(0.002, runtime.stop)
    timer.cancel()
    runtime.run()
    assert called == [2]


def test_posting_from_other_threads_wakes_the_runtime():
    runtime, seen = Runtime(), []
    thread = serve(runtime)

    def post(n):
        for i in range(100):
            runtime.post(seen.append, (n, i))

    posters = [threading.Thread(target=post, args=(n,)) for n in range(4)]
    for poster in posters:
        poster.start()
    for poster in posters:
        poster.join()
    runtime.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert sorted(seen) == [(n, i) for n in range(4) for i in range(100)]
    assert [i for n, i in seen if n == 0] == list(range(100))


def test_a_node_beside_the_others_does_not_delay_them():
    release, threads = threading.Event(), []

    def slow(batch):
        threads.append(threading.current_thread().name)
        assert release.wait(10)
        return batch

    codec = Node("codec", slow, beside=True)
    node, batches = recording()

    async def quick():
        for x in range(5):
            await node(x)
        release.set()
        return "quick"

    async def walk():
        done = await gather(codec("a"), codec("b"), quick(), late())
        runtime.stop()
        return done

    async def late():
        await node(0)
        return await codec("c")

    runtime, end = Runtime(), Outcome()
    runtime.spawn(walk(), waiter=end)
    runtime.run()
    assert end.value == ["a", "b", "quick", "c"]
    assert len(batches) == 5
    assert codec.batch_sizes == {2: 1, 1: 1}
    assert set(threads) == {"mstar-lane"}
    assert not [t for t in threading.enumerate() if t.name == "mstar-lane"]


def test_errors_and_withdrawn_calls_beside_the_others():
    release = threading.Event()

    def slow(batch):
        assert release.wait(10)
        raise ValueError("codec")

    codec = Node("codec", slow, beside=True)

    async def guilty():
        with pytest.raises(ValueError, match="codec"):
            await codec(1)
        runtime.stop()
        return "caught"

    async def gone():
        await codec(2)

    runtime, ends = Runtime(), [Outcome(), Outcome()]
    runtime.spawn(guilty(), waiter=ends[0])
    task = runtime.spawn(gone(), waiter=ends[1])
    thread = serve(runtime)
    while not codec.batch_sizes:
        time.sleep(0.001)
    runtime.post(task.withdraw)
    runtime.post(release.set)
    thread.join(10)
    assert not thread.is_alive()
    assert (ends[0].value, ends[1].told) == ("caught", 0)


def test_a_batch_is_handed_over_to_the_lane_with_what_it_has_to_wait_for():
    told = []

    def hand_over():
        told.append(("handed", threading.current_thread().name))
        return lambda: told.append(("ready", threading.current_thread().name))

    def run(batch):
        told.append(("run", threading.current_thread().name))
        return batch

    node = Node("aside", run, beside=True)
    runtime = Runtime(hand_over=hand_over)

    async def walk():
        told.append(await node(1))
        runtime.stop()

    runtime.spawn(walk())
    runtime.run()
    assert told.pop() == 1
    main = threading.current_thread().name
    assert told == [("handed", main), ("ready", "mstar-lane"), ("run", "mstar-lane")]
