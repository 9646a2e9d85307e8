"""Events on an event loop."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref

import pytest

from mstar.engine.handle import Handle
from mstar.engine.listening import merged
from mstar.errors import RequestFailed
from mstar.types import TextChunk, Usage
from tests.waiting import until


def ended(handle: Handle, error: BaseException | None = None) -> Handle:
    handle.end(error, Usage())
    return handle


async def collected(handles) -> list[tuple[int, str]]:
    return [(index, e.text) async for index, events in merged(handles) for e in events]


def test_events_of_several_requests_come_as_they_are_made():
    handles = [Handle("a"), Handle("b")]

    async def main() -> list:
        task = asyncio.create_task(collected(handles))
        for index in (1, 0, 1):
            await asyncio.sleep(0.001)
            handles[index].event(TextChunk(str(index)))
        for handle in handles:
            ended(handle)
        return await task

    assert asyncio.run(main()) == [(1, "1"), (0, "0"), (1, "1")]


def test_an_error_ends_it_and_keeps_no_events_alive():
    alive: list[weakref.ref] = []

    def failed() -> Handle:
        handle = ended(Handle("a"), RequestFailed("no"))
        alive.append(weakref.ref(handle))
        return handle

    async def main() -> None:
        with pytest.raises(RequestFailed):
            async for _ in merged([failed()]):
                pass

    gc.disable()
    try:
        asyncio.run(main())
        assert alive[0]() is None
    finally:
        gc.enable()


def test_a_loop_that_has_news_for_hundreds_still_does_other_things_between_them():
    handles = [Handle(str(index)) for index in range(200)]
    resumed: list[int] = []
    ticks: list[int] = []  # how many had been resumed at each turn of the loop

    async def follow(index: int) -> None:
        async for _ in merged([handles[index]]):
            resumed.append(index)

    async def main() -> None:
        tasks = [asyncio.create_task(follow(index)) for index in range(len(handles))]
        await asyncio.sleep(0.01)
        news = threading.Thread(target=lambda: [h.event(TextChunk("x")) for h in handles])
        news.start()
        while len(resumed) < len(handles):
            ticks.append(len(resumed))
            await asyncio.sleep(0)
        news.join()
        for handle in handles:
            ended(handle)
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert sorted(resumed) == list(range(200))
    assert max(b - a for a, b in itertools.pairwise(ticks)) <= 16


def test_news_from_many_threads_wake_everyone():
    handles = [Handle(str(index)) for index in range(16)]

    def tell(handle: Handle) -> None:
        for count in range(200):
            handle.event(TextChunk(str(count)))
        ended(handle)

    async def main() -> list[list]:
        threads = [threading.Thread(target=tell, args=(handle,)) for handle in handles]
        for thread in threads:
            thread.start()
        found = await asyncio.gather(*(collected([handle]) for handle in handles))
        until(lambda: not any(thread.is_alive() for thread in threads))
        return found

    want = [(0, str(count)) for count in range(200)]
    assert asyncio.run(main()) == [want] * 16


def test_news_for_a_loop_that_was_closed_trouble_nobody(caplog):
    handle = Handle("a")

    async def main() -> None:
        task = asyncio.create_task(collected([handle]))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(main())
    handle.event(TextChunk("x"))
    assert ended(handle).result().text == "x"
    assert not caplog.records
