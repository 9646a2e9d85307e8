from __future__ import annotations

import pytest
from walks import Gate, Outcome, outcomes, results, settle

from mstar.engine.channel import Channel
from mstar.engine.runtime import Runtime
from mstar.engine.traps import spawn


def test_items_arrive_in_order_and_the_end_ends_the_loop():
    async def walk():
        channel = Channel()
        spawn(produce(channel))
        return [item async for item in channel]

    async def produce(channel):
        for item in range(5):
            await channel.put(item)
        channel.close()

    assert results(walk()) == [list(range(5))]


def test_put_waits_while_the_channel_is_full():
    sizes, gate = [], Gate()

    async def produce(channel):
        for item in range(6):
            await channel.put(item)
            sizes.append(len(channel))
        channel.close()

    async def walk():
        channel = Channel(capacity=2)
        spawn(produce(channel))
        await gate.wait()
        assert sizes == [1, 2]
        return [item async for item in channel]

    runtime, end = Runtime(), Outcome()
    runtime.spawn(walk(), waiter=end)
    settle(runtime)
    gate.open()
    settle(runtime)
    assert (end.value, end.error) == (list(range(6)), None)
    assert max(sizes) == 2


def test_several_writers_and_readers_lose_and_double_nothing():
    async def walk():
        channel, got = Channel(capacity=3), []

        async def write(n):
            for i in range(20):
                await channel.put((n, i))

        async def read():
            async for item in channel:
                got.append(item)

        writers = [spawn(write(n)) for n in range(3)]
        readers = [spawn(read()) for _ in range(3)]
        for task in writers:
            await task
        channel.close()
        for task in readers:
            await task
        return got

    (got,) = results(walk())
    assert sorted(got) == [(n, i) for n in range(3) for i in range(20)]
    assert [i for n, i in got if n == 1] == list(range(20))


def test_an_error_reaches_the_reader_after_what_was_put_before_it():
    async def walk():
        channel, got = Channel(), []
        channel.send(1)
        channel.close(KeyError("producer"))
        channel.close()
        try:
            async for item in channel:
                got.append(item)
        except KeyError as error:
            got.append(error.args)
        with pytest.raises(KeyError):
            await channel.__anext__()
        return got

    assert results(walk()) == [[1, ("producer",)]]


def test_closing_wakes_waiting_readers_and_writers():
    async def read(channel):
        return [item async for item in channel]

    async def write(channel):
        await channel.put("late")

    async def walk(channel):
        channel.close()

    full = Channel(capacity=1)
    full.send("first")
    empty = Channel()
    ends = outcomes(read(empty), write(full), walk(empty), walk(full))
    assert ends[0].value == []
    assert "closed" in str(ends[1].error)
    with pytest.raises(RuntimeError, match="closed"):
        empty.send(1)


def test_a_woken_reader_that_ends_before_it_looks_leaves_the_item_to_another():
    runtime, channel, ends = Runtime(), Channel(), [Outcome(), Outcome()]

    async def read():
        return await channel.__anext__()

    first, _ = (runtime.spawn(read(), waiter=end) for end in ends)
    settle(runtime)
    channel.send("item")
    first.withdraw()
    settle(runtime)
    assert (ends[0].told, ends[1].value) == (0, "item")
    assert not channel._readers


def test_a_woken_writer_that_ends_before_it_puts_leaves_the_room_to_another():
    runtime, channel, end = Runtime(), Channel(capacity=1), Outcome()
    channel.send(0)

    async def write(item):
        await channel.put(item)

    async def read_and_end():
        item = await channel.__anext__()
        first.withdraw()
        return item, await channel.__anext__()

    first = runtime.spawn(write(1))
    runtime.spawn(write(2))
    settle(runtime)
    runtime.spawn(read_and_end(), waiter=end)
    settle(runtime)
    assert end.value == (0, 2)
    assert not channel._writers


def test_capacity_must_be_at_least_one():
    with pytest.raises(ValueError, match="capacity=0"):
        Channel(capacity=0)
