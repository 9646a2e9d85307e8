"""Around every request: its id, its key, its line in the log, and the answer to any error."""

from __future__ import annotations

import hmac
import logging
import time
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import mstar
from mstar.http.allowance import new_allowance
from mstar.http.errors import Refused, error_response
from mstar.http.front import Front
from mstar.http.record import Record, route_path

__all__ = ["IMAGE_FILES", "Aborted", "Doorkeeper", "Recorder", "check_key"]

log = logging.getLogger("mstar.http")
# Tells clients that the last line of a stream always says how it ended.
_VERSION = (b"x-mstar-version", mstar.__version__.encode())
_OPEN = ("/health", "/healthz", "/ready", "/version", "/metrics")
_SCHEMES = (b"bearer", b"api-key")  # the second is what robots' clients say
# Files whose names are secrets: browsers send no key.
IMAGE_FILES = "/v1/images/files/"


class Aborted(Exception):
    """An answer that cannot be completed: the connection is cut, so that the client notices."""


class Recorder:
    """Gives a request its record; counts and logs it; answers what nothing else has caught."""

    def __init__(self, app: ASGIApp, front: Front) -> None:
        self.app, self.front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record(scope, send)
        new_allowance(self.front.settings)
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = ((b"x-request-id", record.request_id.encode()), _VERSION)
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        self.front.busy += 1
        try:
            await self.app(scope, receive, send_on)
        except Aborted as error:
            record.note(aborted=str(error))
        except (OSError, ClientDisconnect):  # the client has gone in the middle of it
            record.note(aborted="the client has disconnected")
        except Exception as error:
            log.exception("request %s failed", record.request_id)
            response = error_response(error, scope)
            record.note(error=type(error).__name__)
            if status:
                raise
            await response(scope, receive, send_on)
        finally:
            record.send = None  # it leads to the scope, which holds the record: a circle
            self.front.busy -= 1
            self.front.held -= record.held
            seconds = time.monotonic() - record.began
            route = getattr(scope.get("route"), "path", "unmatched")
            self.front.metrics.served(route, record.method, status or 499, seconds)
            record.write(status or 499, seconds)


class Doorkeeper:
    """Asks for the key, where there is one; websockets ask for it themselves."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope):
            try:
                check_key(scope, self._key)
            except Refused as refused:
                await error_response(refused, scope)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def check_key(scope: Scope, expected: bytes) -> None:
    """Raise `Refused` if a request does not bring the key."""
    given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
    scheme, _, key = given.partition(b" ")
    known = scheme.lower() in _SCHEMES
    if not (hmac.compare_digest(key.strip(), expected) and known):
        what = "wrong API key" if given else "an API key is needed"
        raise Refused(401, f"{what}: send the header Authorization: Bearer KEY")


def _is_open(scope: Any) -> bool:
    path = route_path(scope)
    return path in _OPEN or (
        path.startswith(IMAGE_FILES) and scope.get("method") in ("GET", "HEAD")
    )
