"""One request, from its first byte to the last, with all that can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import httpcore

from mstar.bench.connection import Connections
from mstar.bench.routes.base import Request, Route
from mstar.bench.trace import Bad, Trace
from mstar.transport import refusal

__all__ = ["run_one"]

_AFTER_DONE = 1.0  # seconds that a server has to end the body after it said that it is complete


async def run_one(
    connections: Connections,
    route: Route,
    request: Request,
    trace: Trace,
    timeout: float,
    leave_after: float | None = None,
) -> None:
    """Send the request and fill the trace. Nothing is raised for what a server does.

    Args:
        timeout: seconds for the whole request.
        leave_after: seconds after which the client goes away.
    """
    leaves = leave_after is not None and leave_after < timeout
    limit = leave_after if leaves else timeout
    try:
        await asyncio.wait_for(_exchange(connections, route, request, trace), limit)
        if trace.outcome == "done" and trace.empty:
            trace.fail("empty answer", f"nothing came (finish_reason={trace.finish_reason})")
    except asyncio.TimeoutError:
        if leaves:
            trace.outcome = "left"
        else:
            trace.fail("timeout", f"not done within {timeout:g} s")
    except Bad as bad:
        trace.fail(bad.reason, str(bad))
    except httpcore.ConnectError as error:
        trace.fail("no connection", str(error))
    except httpcore.RemoteProtocolError as error:
        trace.fail("broke off" if trace.status else "no answer", str(error))
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        trace.fail("broke off", str(error))
    if trace.end is None:
        trace.end = time.perf_counter()


async def _exchange(connections: Connections, route: Route, request: Request, trace: Trace) -> None:
    sending = connections.send("POST", request.path, request.body, request.headers, trace)
    async with sending as answer:
        trace.status = answer.status
        if not 200 <= answer.status < 300:
            body = await answer.read()
            error = refusal(
                "POST", connections.base + request.path, answer.status, answer.headers, body
            )
            raise Bad(f"HTTP {answer.status}", str(error))
        reader = route.reader(trace, answer.headers.get("content-type", "").lower())
        pieces = aiter(answer)
        async for at, piece in pieces:
            reader.feed(at, piece)
            if reader.over:
                trace.end = at
                break
        if reader.over:
            await _rest(pieces)
        reader.finish(answer.at)
        trace.end = trace.end or answer.at


async def _rest(pieces: AsyncIterator[tuple[float, bytes]]) -> None:
    """Read on, so that the connection can be used again; not for long."""

    async def read() -> None:
        async for _ in pieces:
            pass

    with contextlib.suppress(asyncio.TimeoutError, httpcore.NetworkError, httpcore.ProtocolError):
        await asyncio.wait_for(read(), _AFTER_DONE)
