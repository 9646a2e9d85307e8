"""One request of the engine, driven from an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request

from mstar.errors import EngineClosed
from mstar.http.errors import Refused
from mstar.http.front import Front
from mstar.http.record import record_of
from mstar.types import Event

__all__ = ["running"]


@contextlib.asynccontextmanager
async def running(
    front: Front, request: Request, arguments: dict[str, Any]
) -> AsyncIterator[Running]:
    """Submit a request; leaving the block, or the client's disconnect, cancels it.

    Args:
        front: see there.
        request: of HTTP, its body read.
        arguments: of `Engine.submit`.

    Raises:
        MStarError: the engine refuses it. Refused: the server takes no more work.
    """
    front.check_open()
    record = record_of(request.scope)
    if not record.named:  # one name for the request of HTTP and the engine's
        arguments.setdefault("request_id", record.request_id)
        record.request_id = arguments["request_id"]
    began = time.monotonic()
    handle = await _submit(front.engine, arguments)
    front.live.add(handle)
    if handle.request_id != record.request_id:
        record.note(engine_request_id=handle.request_id)
    watcher = asyncio.ensure_future(_cancel_when_gone(request, handle))
    run = Running(front, handle, began)
    try:
        yield run
    finally:
        watcher.cancel()
        front.live.discard(handle)
        if not handle.done:
            handle.cancel()
        run.close(record)


class Running:
    """A submitted request: its events, and what is measured while they pass."""

    def __init__(self, front: Front, handle: Any, began: float) -> None:
        self.handle = handle
        self._front = front
        self._began = began
        self._first: float | None = None
        self._first_audio: float | None = None
        self._last: Event | None = None

    @property
    def request_id(self) -> str:
        """The id inside the engine."""
        return self.handle.request_id

    async def batches(self) -> AsyncIterator[list[Event]]:
        """The events as they come; those that are there at once come together.

        Raises:
            MStarError: what ended the request early.
        """
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def tell() -> None:  # on the engine's thread
            if not changed.is_set():
                with contextlib.suppress(RuntimeError):  # the loop was closed
                    loop.call_soon_threadsafe(changed.set)

        self.handle.listen(tell)
        index = 0
        while True:
            changed.clear()
            events, done = self.handle.taken(index)
            if events:
                self._look_at(events)
                index += len(events)
                yield events
            if done:
                self.handle.raise_for_error()
                return
            if not events:
                await changed.wait()

    async def events(self) -> AsyncIterator[Event]:
        """All events, one by one."""
        async for batch in self.batches():
            for event in batch:
                yield event

    def _look_at(self, events: list[Event]) -> None:
        now = time.monotonic() - self._began
        self._last = events[-1]
        for event in events:
            if event.finish_reason is not None:
                continue
            if self._first is None:
                self._first = now
            if event.modality == "audio" and self._first_audio is None:
                self._first_audio = now

    def close(self, record: Any) -> None:
        """Count and log how it went."""
        last = self._last
        usage = last.usage if last is not None else None
        self._front.metrics.request(self._first, self._first_audio, usage)
        record.note(
            first_event_s=self._first,
            finish_reason=last.finish_reason if last is not None else None,
        )
        if usage is not None:
            record.note(
                prompt_tokens=usage.prompt_tokens,
                generated_tokens=usage.generated_tokens,
                audio_s=round(usage.audio_seconds, 3),
            )


async def _submit(engine: Any, arguments: dict[str, Any]) -> Any:
    """`engine.submit` on another thread; whoever stops waiting does not want it any more."""
    task = asyncio.ensure_future(asyncio.to_thread(engine.submit, **arguments))
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


async def _cancel_when_gone(request: Request, handle: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    handle.cancel()
