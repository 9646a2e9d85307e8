"""Every error that mstar raises on purpose.

MStarError
├── InvalidRequest (ValueError)     a field is wrong: names the field, its value, what is allowed
│   └── ContextTooLong              the prompt has no room in the model's context, or in its memory
├── ModelNotFound (LookupError)     no such model in the registry, on disk or on the hub
├── WeightsError                    a checkpoint lacks a tensor, or holds one of another shape
├── EngineOverloaded                the queue is full; try again later
├── EngineClosed                    the engine was closed, or its thread died
├── RequestFailed                   a component of the model raised while it served the request
│   └── OutOfMemory                 the device has no room even for this request alone
└── RequestStopped                  the request ended early; `.partial` holds what was made
    ├── RequestCancelled
    └── RequestTimeout (TimeoutError)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "ContextTooLong",
    "DeadlineExceeded",
    "EngineClosed",
    "EngineOverloaded",
    "InvalidRequest",
    "MStarError",
    "ModelNotFound",
    "OutOfMemory",
    "RequestCancelled",
    "RequestFailed",
    "RequestStopped",
    "RequestTimeout",
    "WeightsError",
    "nearest",
]


class MStarError(Exception):
    """Base of all errors of this package."""


class InvalidRequest(MStarError, ValueError):
    """A request that cannot be served as asked.

    Args:
        field: the argument or parameter at fault.
        value: what was given.
        allowed: what would be accepted, in words.
    """

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}={_short(value)}: {allowed}")

    def __reduce__(self) -> tuple:
        return type(self), (self.field, self.value, self.allowed)


class ContextTooLong(InvalidRequest):
    """A prompt that is longer than what the model, or its KV cache, takes."""


class ModelNotFound(MStarError, LookupError):
    """No model by that name, path or repository id."""


class WeightsError(MStarError):
    """A checkpoint that does not fit the network it is loaded into."""


class EngineOverloaded(MStarError):
    """The engine's queue is full."""


class EngineClosed(MStarError):
    """The engine no longer takes or serves requests."""


class RequestFailed(MStarError):
    """A component of the model raised while it served this request."""


class OutOfMemory(RequestFailed):
    """Not even this request alone fits into the device's memory."""


class RequestStopped(MStarError):
    """A request that ended before it was complete; `partial` is its result so far."""

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class RequestCancelled(RequestStopped):
    """The request was cancelled by its caller."""


class RequestTimeout(RequestStopped, TimeoutError):
    """The request's deadline passed."""


class DeadlineExceeded(RequestTimeout):
    """A policy's actions did not come in time."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name most like `name`, or the empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _short(value: Any, limit: int = 80) -> str:
    if isinstance(value, (str, bytes)):  # which may be large
        value = value[: limit + 1]
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
