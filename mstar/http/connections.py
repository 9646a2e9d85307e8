"""Connections that cost something and bring nothing are closed.

uvicorn waits for the headers of a request as long as the client likes, and takes any number of
connections. Here a request's headers must be complete within a time and a length, a client must
take what it is sent, and when there are too many connections the one that has been idle for
longest makes room, so that `/health` and everybody else are still answered.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["guarded"]

_LONGEST_HEAD = 64 * 1024  # bytes


def guarded(header_timeout: float, stall_timeout: float, most: int) -> type[asyncio.Protocol]:
    """A protocol for `uvicorn.Config(http=...)`.

    Args:
        header_timeout: seconds within which the headers of a request must be complete; on a
            connection that is kept alive, from the first byte of the next request on.
        stall_timeout: seconds within which a client must take some of what it is sent.
        most: connections at a time.
    """
    limits = {"header_timeout": header_timeout, "stall_timeout": stall_timeout, "most": most}
    return type("Guarded", (_Guarded,), limits)


class _Guarded(HttpToolsProtocol):
    header_timeout: float
    stall_timeout: float
    most: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: asyncio.TimerHandle | None = None  # while headers are to come
        self._stalled: asyncio.TimerHandle | None = None  # while the client takes nothing
        self._head = 0  # bytes of the headers so far
        self._in_body = False  # maybe that of a request that was answered already
        self._since = 0.0  # when the connection became idle, or its request began

    @property
    def _idle(self) -> bool:
        """Whether no request is being served."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        """There must be room, and a request must come."""
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > self.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Whatever comes while no request is served must become one in time."""
        if self._idle:
            if self._waiting is None:
                self._wait_for_head()
            if not self._in_body:
                self._head += len(data)
        super().data_received(data)
        if self._waiting is not None and self._head > _LONGEST_HEAD:
            self._end(b"431 Request Header Fields Too Large")

    def on_headers_complete(self) -> None:
        """The request has come."""
        self._stop_waiting()
        self._in_body, self._since = True, self.loop.time()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Its body, too."""
        self._in_body = False
        super().on_message_complete()
        if self._idle:  # the rest of a body that nobody wanted
            self._stop_waiting()
            self._wait_for_head()

    def on_response_complete(self) -> None:
        """uvicorn waits for the next request for its time of keep-alive."""
        self._since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client takes nothing; the answer has to wait."""
        super().pause_writing()
        if self._stalled is None:
            abort = self.transport.abort
            self._stalled = self.loop.call_later(self.stall_timeout, abort)

    def resume_writing(self) -> None:
        """It does."""
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop_waiting()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn keeps it when the connection broke

    def handle_websocket_upgrade(self) -> None:
        """The connection is no longer one of HTTP."""
        self._stop_waiting()
        super().handle_websocket_upgrade()

    def _wait_for_head(self) -> None:
        self._head, self._since = 0, self.loop.time()
        end = functools.partial(self._end, b"408 Request Timeout")
        self._waiting = self.loop.call_later(self.header_timeout, end)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _end(self, status: bytes) -> None:
        """Close; whoever has said something gets an answer."""
        self._stop_waiting()
        if not self.transport.is_closing():
            if self._head:
                rest = b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                self.transport.write(b"HTTP/1.1 " + status + rest)
            self.transport.close()

    def _make_room(self) -> None:
        """Close the connection that has been idle for longest, or else the one that has sent a
        body for longest; this one if all requests are complete."""
        others = [one for one in self.connections if one is not self]
        others = [one for one in others if getattr(one, "_can_go", False)]  # no websockets
        first = min(others, key=lambda one: (not one._idle, one._since), default=self)
        if first is self:
            self._head = 1  # so that it is told
            self._end(b"503 Service Unavailable\r\nretry-after: 1")
        else:
            self.connections.discard(first)  # it counts no more
            first.transport.close()

    @property
    def _can_go(self) -> bool:
        return self._idle or (self._in_body and not self.cycle.response_started)
