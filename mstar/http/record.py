"""What is known about one HTTP request: becomes one line of the log."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterable
from typing import Any

__all__ = ["Record", "is_openai", "record_of", "route_path"]

log = logging.getLogger("mstar.http")
_KEY = "mstar.record"
_LONGEST_ID = 200


class Record:
    """Filled while a request is served."""

    def __init__(self, scope: dict[str, Any], send: Any = None) -> None:
        self.send = send  # what the server gave, with nothing of the app around it
        incoming = _incoming_id(scope.get("headers", ()))
        self.named = incoming is not None  # by the client
        self.request_id = incoming or f"req-{uuid.uuid4().hex}"
        self.began = time.monotonic()
        self.method: str = scope.get("method", "")
        self.path: str = scope.get("path", "")
        self.held = 0  # bytes of the body
        self.notes: dict[str, Any] = {}
        scope[_KEY] = self

    def note(self, **notes: Any) -> None:
        """Add to the line; `None` is left out."""
        self.notes.update((name, value) for name, value in notes.items() if value is not None)

    def add(self, **numbers: float) -> None:
        """Add to the numbers in the line."""
        self.note(**{name: self.notes.get(name, 0) + more for name, more in numbers.items()})

    def write(self, status: int, seconds: float) -> None:
        """Log the line, as JSON."""
        line = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path[:200],
            "status": status,
            "seconds": round(seconds, 4),
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in self.notes.items()},
        }
        log.info("%s", json.dumps(line))


def record_of(scope: dict[str, Any]) -> Any:
    """The record that the middleware made; `None` before it has made one."""
    return scope.get(_KEY)


def route_path(scope: dict[str, Any]) -> str:
    """The path below the place where the app is mounted."""
    path, root = scope.get("path", ""), scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


def is_openai(scope: dict[str, Any]) -> bool:
    """Whether a request speaks to the OpenAI-compatible routes."""
    path = route_path(scope)
    return path == "/v1" or path.startswith("/v1/")


def _incoming_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The client's `x-request-id`, if it can be sent back and logged as it is."""
    for name, value in headers:
        if name == b"x-request-id" and 0 < len(value) <= _LONGEST_ID:
            text = value.decode("latin-1")
            return text if text.isascii() and text.isprintable() else None
    return None
