"""Requests of the engine, driven from an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request

from mstar.engine import listening
from mstar.errors import EngineClosed
from mstar.http.errors import Refused
from mstar.http.front import Front
from mstar.http.record import record_of
from mstar.types import Event

__all__ = ["Running", "merged", "running", "running_all"]

# `Engine.submit` decodes media, so it takes time and memory; nothing else waits for these threads.
_SUBMITTERS = ThreadPoolExecutor(4, "mstar-submit")


@contextlib.asynccontextmanager
async def running(
    front: Front, request: Request, arguments: dict[str, Any]
) -> AsyncIterator[Running]:
    """Submit a request; leaving the block, or the client's disconnect, cancels it.

    Args:
        request: of HTTP, its body read.
        arguments: of `Engine.submit`.

    Raises:
        MStarError: the engine refuses it. Refused: the server takes no more work.
    """
    async with running_all(front, request, [arguments]) as (run,):
        yield run


@contextlib.asynccontextmanager
async def running_all(
    front: Front, request: Request, several: Sequence[dict[str, Any]]
) -> AsyncIterator[list[Running]]:
    """`running` for the several requests of the engine that one request of HTTP asks for.

    Their ids in the engine are that of the request with `-1`, `-2` ... from the second on.
    """
    front.check_open()
    record = record_of(request.scope)
    if not record.named:  # one name for the request of HTTP and the engine's
        record.request_id = several[0].setdefault("request_id", record.request_id)
        for index, arguments in enumerate(several[1:], start=1):
            arguments.setdefault("request_id", f"{record.request_id}-{index}")
    runs: list[Running] = []
    watcher = asyncio.ensure_future(_cancel_when_gone(request, runs))
    try:
        for arguments in several:
            began = time.monotonic()
            runs.append(Running(front, await _submit(front.engine, arguments), began))
            front.live.add(runs[-1].handle)
            if watcher.done():  # the client left meanwhile
                runs[-1].handle.cancel()
        if runs[0].request_id != record.request_id:
            record.note(engine_request_id=runs[0].request_id)
        yield runs
    finally:
        watcher.cancel()
        for run in runs:
            front.live.discard(run.handle)
            if not run.handle.done:
                run.handle.cancel()
        for run in runs:
            run.close(record)


async def merged(runs: Sequence[Running]) -> AsyncIterator[tuple[int, list[Event]]]:
    """The events of all requests as they come, each batch with the number of its request.

    Raises:
        MStarError: what ended any of them early.
    """
    async for index, events in listening.merged([run.handle for run in runs]):
        runs[index].look_at(events)
        yield index, events


class Running:
    """A submitted request: its events, and what is measured while they pass."""

    def __init__(self, front: Front, handle: Any, began: float) -> None:
        self.handle = handle
        self.request_id: str = handle.request_id  # the one inside the engine
        self._front = front
        self._began = began
        self._first: float | None = None
        self._first_audio: float | None = None
        self._last: Event | None = None

    async def batches(self) -> AsyncIterator[list[Event]]:
        """The events as they come; those that are there at once come together.

        Raises:
            MStarError: what ended the request early.
        """
        async for _, events in listening.merged([self.handle]):
            self.look_at(events)
            yield events

    async def events(self) -> AsyncIterator[Event]:
        """All events, one by one."""
        async for batch in self.batches():
            for event in batch:
                yield event

    def look_at(self, events: list[Event]) -> None:
        """Note when what came."""
        self._last = events[-1]
        if self._first_audio is not None:
            return
        now = time.monotonic() - self._began
        for event in events:
            if event.finish_reason is not None:
                continue
            if self._first is None:
                self._first = now
            if event.modality == "audio" and self._first_audio is None:
                self._first_audio = now

    def close(self, record: Any) -> None:
        """Count and log how it went, and let go of the engine's handle.

        It holds its error, which holds the frames that it went through, which hold this object: a
        circle that would keep all events until the next full garbage collection.
        """
        self.handle = None
        last = self._last
        usage = last.usage if last is not None else None
        self._front.metrics.request(self._first, self._first_audio, usage)
        if self._first is not None:
            first = min(self._first, record.notes.get("first_event_s", self._first))
            record.note(first_event_s=first)
        record.note(finish_reason=last.finish_reason if last is not None else None)
        if usage is not None:  # all of them read the same prompt
            record.note(prompt_tokens=usage.prompt_tokens)
            record.add(generated_tokens=usage.generated_tokens, audio_s=usage.audio_seconds)


async def _submit(engine: Any, arguments: dict[str, Any]) -> Any:
    """`engine.submit` on another thread; whoever stops waiting does not want it any more."""
    submit = functools.partial(engine.submit, **arguments)
    task = asyncio.get_running_loop().run_in_executor(_SUBMITTERS, submit)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_forget)
        raise
    except EngineClosed as error:
        raise Refused(503, str(error), kind="EngineClosed") from None


def _forget(task: asyncio.Future) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().cancel()


async def _cancel_when_gone(request: Request, runs: Sequence[Running]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for run in runs:
        run.handle.cancel()
