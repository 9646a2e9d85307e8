"""The websocket that robots speak: one frame with an observation in, one with actions out.

The protocol is openpi's: on any path, the server speaks first, with its metadata; then each binary
frame is answered by one. An error is answered by one text frame, and the connection stays open: the
client raises it, and can go on with the next observation instead of connecting anew. Only where
nothing more can come, since the engine is gone or the server ends, is the connection closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter
from prometheus_client import Counter, Gauge, Histogram
from starlette.responses import PlainTextResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from mstar.http.errors import Refused, error_response, refusal
from mstar.http.front import Front
from mstar.http.middleware import check_key
from mstar.http.policy import Seat, ShownPolicy
from mstar.http.record import Record

__all__ = ["policy_routes"]

log = logging.getLogger("mstar.http")
_MOST = 256  # connections at a time
# One thread waits for each inference; what waits together is batched by the engine.
_WORKERS = ThreadPoolExecutor(64, "mstar-policy")
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5, 30)
_CLOSING = 0.05  # seconds; until a refused connection is closed, uvicorn thinks it was forgotten
_ENDED = 1011, "the engine has ended"
_RESTART = 1012, "the server is shutting down"


def policy_routes(front: Front, policy: ShownPolicy | None) -> APIRouter:
    """`/healthz`, and the websocket on every path.

    Args:
        policy: None refuses all connections.
    """
    router = APIRouter()
    figures = _Figures(front.metrics.registry)
    open_now: set[Seat] = set()

    @router.get("/healthz", include_in_schema=False)
    async def healthz() -> Response:
        """What clients of the protocol ask for."""
        try:
            front.check_open()
        except Refused as refused:
            return PlainTextResponse(f"{refused.message}\n", 503)
        return PlainTextResponse("OK\n")

    async def serve(socket: WebSocket) -> None:
        record = Record(socket.scope)
        record.method = "WEBSOCKET"
        status, seat = 101, Seat()
        try:
            try:
                _check(front, policy, socket, len(open_now))
            except Refused as refused:
                status = refused.status
                await _refuse(socket, refused)
                return
            open_now.add(seat)
            figures.open.inc()
            try:
                await socket.accept()
                await _Conversation(front, policy, socket, seat, figures, record).run()
            finally:
                figures.open.dec()
                open_now.discard(seat)
        except (OSError, WebSocketDisconnect):
            record.note(aborted="the client has disconnected")
        finally:
            figures.connections.labels(str(status)).inc()
            record.write(status, time.monotonic() - record.began)

    router.add_websocket_route("/{path:path}", serve)
    return router


class _Conversation:
    """One connection, from the metadata to its end."""

    def __init__(
        self,
        front: Front,
        policy: ShownPolicy,
        socket: WebSocket,
        seat: Seat,
        figures: _Figures,
        record: Record,
    ) -> None:
        self._front, self._policy, self._socket = front, policy, socket
        self._seat, self._figures, self._record = seat, figures, record
        self._previous: float | None = None
        self._counts = {"ok": 0, "error": 0}

    async def run(self) -> None:
        """Until either side ends it."""
        socket = self._socket
        await socket.send_bytes(self._policy.metadata)
        coming = asyncio.ensure_future(socket.receive())
        try:
            while (message := await coming)["type"] != "websocket.disconnect":
                if self._front.draining:
                    await socket.close(*_RESTART)
                    return
                coming = asyncio.ensure_future(socket.receive())
                close = await self._answer(message.get("bytes"), coming)
                if close is not None:
                    await socket.close(*close)
                    return
            self._record.note(close_code=message.get("code"))
        finally:
            coming.cancel()
            self._seat.cancel()
            self._record.note(inferences=self._counts["ok"], errors=self._counts["error"] or None)

    async def _answer(self, frame: bytes | None, coming: asyncio.Future) -> tuple[int, str] | None:
        """Answer a frame; if `coming` says that the client has gone, give it up.

        Returns:
            Code and reason with which to close the connection; None to go on.
        """
        began = time.monotonic()
        args = (self._policy.answer, self._seat, frame, self._previous)
        close = None
        self._front.busy += 1
        self._front.live.add(self._seat)
        try:
            job = asyncio.get_running_loop().run_in_executor(_WORKERS, *args)
            await asyncio.wait({coming, job}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done() and coming.result()["type"] == "websocket.disconnect":
                self._seat.cancel()
            try:
                answer = await job
            except Exception as error:
                refused = refusal(error)
                if refused.status == 500:
                    log.error("request %s failed", self._record.request_id, exc_info=error)
                    close = _ENDED if refused.kind == "EngineClosed" else None
                self._count("error", began)
                await self._socket.send_text(f"{refused.kind}: {refused.message:.4000}")
            else:
                self._count("ok", began)
                await self._socket.send_bytes(answer)
                self._previous = time.monotonic() - began
        finally:
            self._front.live.discard(self._seat)
            self._front.busy -= 1
        return _RESTART if self._front.draining else close

    def _count(self, outcome: str, began: float) -> None:
        self._counts[outcome] += 1
        self._figures.inferences.labels(outcome).inc()
        self._figures.seconds.observe(time.monotonic() - began)


class _Figures:
    """For Prometheus."""

    def __init__(self, registry: Any) -> None:
        given = {"registry": registry}
        name, help = "mstar_policy_connections_open", "Robots that are connected."
        self.open = Gauge(name, help, **given)
        help = "Websockets that ended, by the status of their handshake; 101: a robot was served."
        self.connections = Counter("mstar_policy_connections", help, ["status"], **given)
        name, help = "mstar_policy_inferences", "Observations answered."
        self.inferences = Counter(name, help, ["outcome"], **given)
        name, help = "mstar_policy_inference_seconds", "From an observation to its answer."
        self.seconds = Histogram(name, help, buckets=_SECONDS, **given)


def _check(front: Front, policy: ShownPolicy | None, socket: WebSocket, open_now: int) -> None:
    """Raise if a connection is not to be accepted."""
    settings = front.settings
    if settings.api_key:
        check_key(socket.scope, settings.api_key.encode())
    origin = socket.headers.get("origin")
    if origin and not {origin, "*"} & set(settings.cors_origins):  # browsers leave it to us
        raise Refused(403, f"pages of {origin[:200]} may not call")
    if policy is None:
        raise Refused(404, f"{front.card.name} is no policy of a robot: there is no websocket")
    front.check_open()
    if open_now >= _MOST:
        raise Refused(503, f"{_MOST} robots are connected already")


async def _refuse(socket: WebSocket, refused: Refused) -> None:
    """Say so instead of the handshake, where the server can."""
    if "websocket.http.response" in socket.scope.get("extensions", {}):
        answer = error_response(refused, socket.scope)
        del answer.headers["content-length"]  # some releases of uvicorn write their own
        await socket.send_denial_response(answer)
        await asyncio.sleep(_CLOSING)
    else:
        await socket.close(1008, refused.message[:100])
