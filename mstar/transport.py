"""Between a client and its server: addresses, headers, deadlines, and errors by their type."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from mstar import errors
from mstar.errors import (
    ContextTooLong,
    EngineClosed,
    EngineOverloaded,
    InvalidRequest,
    ModelNotFound,
    MStarError,
    RequestCancelled,
    RequestFailed,
    RequestStopped,
    RequestTimeout,
)
from mstar.form import Form, seconds
from mstar.types import GenerateResult

__all__ = ["Deadline", "Refused", "Server", "broken", "error_of", "refusal", "shown", "unreachable"]

_ERROR_HEADER = "x-mstar-error"
_CLOSED = re.compile(r"\b(drain|clos|shut|dead|died|stopp)", re.IGNORECASE)
_OWN_WORDS = re.compile(r"(\w+)=(.*?): (.*)", re.DOTALL)


class Refused(InvalidRequest):
    """A request that the server refused, in the server's words.

    `field`, `value` and `allowed` are taken from the message if it has mstar's form; otherwise
    `field` is empty and `allowed` is the message.
    """

    def __init__(self, message: str) -> None:
        match = _OWN_WORDS.fullmatch(message)
        self.field, self.value, self.allowed = match.groups() if match else ("", None, message)
        MStarError.__init__(self, message)

    def __reduce__(self) -> tuple:
        return type(self), (str(self),), self.__dict__


class RefusedPrompt(Refused, ContextTooLong):
    """A prompt that is too long, in the server's words."""


_KINDS = {name: getattr(errors, name) for name in errors.__all__ if name[0].isupper()}
_KINDS |= {"InvalidRequest": Refused, "ContextTooLong": RefusedPrompt}
_BY_STATUS = {
    404: ModelNotFound,
    408: RequestTimeout,
    429: EngineOverloaded,
    499: RequestCancelled,
    503: EngineOverloaded,
    504: RequestTimeout,
}


class Server:
    """Where the server is, and how it is spoken to; checks what the user gave.

    Args:
        base_url: with `http://` or `https://`; a path is kept.
        timeout: longest silence, in seconds.
        api_key: the bearer token, if there is one.
        connect_timeout: in seconds.
    """

    def __init__(
        self, base_url: str, timeout: float, api_key: str | None, connect_timeout: float
    ) -> None:
        if not re.match(r"https?://[^/\s]+", base_url if isinstance(base_url, str) else ""):
            raise InvalidRequest("base_url", base_url, "must start with http:// or https://")
        if not (api_key is None or (isinstance(api_key, str) and re.fullmatch(r"[!-~]+", api_key))):
            raise InvalidRequest("api_key", "...", "must be ASCII without blanks")
        self.base_url = base_url.rstrip("/")
        self.generate_url = f"{self.base_url}/generate"
        self.health_url = f"{self.base_url}/health"
        self.timeout = seconds("timeout", timeout)
        self.connect_timeout = seconds("connect_timeout", connect_timeout)
        self._api_key = api_key
        # without it `requests` puts what ~/.netrc says in place of the key
        self.authorize = None if api_key is None else lambda request: request

    def headers(self, form: Form | None = None) -> dict[str, str]:
        """Of a request; a deadline is told to the server, which may or may not heed it."""
        headers = {"accept-encoding": "identity"}
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key}"
        if form is not None:
            headers["content-type"] = form.content_type
            headers["accept"] = "application/x-ndjson" if form.stream else "application/json"
            if form.timeout is not None:
                headers["x-request-timeout"] = str(form.timeout)
        return headers

    def timeouts(self, deadline: Deadline) -> tuple[float, float]:
        """Seconds to connect and of silence; raises `TimeoutError` if the deadline has passed."""
        left = deadline.left()
        if left is None:
            return self.connect_timeout, self.timeout
        return min(left, self.connect_timeout), min(left, self.timeout)

    def health_of(self, status: int, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
        """What a reply of `GET /health` says.

        Raises:
            EngineClosed: the server does not serve.
        """
        if status != 200:
            error = refusal("GET", self.health_url, status, headers, body)
            raise EngineClosed(str(error)) if status == 503 else error
        try:
            said = json.loads(body)
        except ValueError:
            said = None
        if not isinstance(said, dict) or not said:
            raise RequestFailed(f"{self.health_url} sent {shown(body)}")
        if said.get("status") != "healthy":
            raise EngineClosed(f"{self.health_url} says {body.decode('utf-8', 'replace')[:200]}")
        return said


class Deadline:
    """When a request has to be done, if there is a limit."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Seconds that are left; raises `TimeoutError` if there are none."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def error_of(
    status: int, message: str, kind: str | None = None, partial: GenerateResult | None = None
) -> MStarError:
    """The typed error for what a server says, with the `status` as attribute.

    Args:
        status: of HTTP.
        message: the server's.
        kind: the name of the error's class, which an mstar server tells; the status decides where
            it is missing or unknown.
        partial: what was made before.
    """
    make = _KINDS.get(kind) or _kind_of(status, message)
    error = make(message, partial) if issubclass(make, RequestStopped) else make(message)
    if isinstance(error, EngineOverloaded):
        error.retry_after = None
    error.status = status
    return error


def _kind_of(status: int, message: str) -> type[MStarError]:
    if status == 503 and _CLOSED.search(message):
        return EngineClosed
    return _BY_STATUS.get(status) or (Refused if 400 <= status < 500 else RequestFailed)


def refusal(
    method: str, url: str, status: int, headers: Mapping[str, str], body: bytes
) -> MStarError:
    """The typed error for a reply other than 200."""
    message = _message(body)
    if message is None:
        words = body.decode("utf-8", "replace").strip()
        reason = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
        message = f"{method} {url} answered {status} {reason}".strip()
        if 300 <= status < 400 and headers.get("location"):
            message += f": redirected to {headers['location']}, use that as base_url"
        elif words and words != reason and not words.startswith(("<", "{")) and words.isprintable():
            message += f": {words[:500]}"
    if status == 404 and re.search(r"/v1/\w+$", url):
        message += "; base_url must not end in /v1, which is for OpenAI's clients"
    error = error_of(status, message, headers.get(_ERROR_HEADER))
    if isinstance(error, EngineOverloaded):
        error.retry_after = _retry_after(headers)
    return error


def unreachable(url: str, cause: BaseException) -> EngineClosed:
    """No connection could be made."""
    return EngineClosed(f"cannot reach {url}: {_root(cause)}")


def broken(url: str, cause: BaseException) -> RequestFailed:
    """The connection was lost after the request was sent."""
    return RequestFailed(f"the connection to {url} broke off: {_root(cause)}")


def _message(body: bytes) -> str | None:
    """What the server says is wrong, in its own JSON, FastAPI's or OpenAI's."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return None
    for key in ("detail", "error", "message"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    if isinstance(said, list) and all(isinstance(item, dict) for item in said):
        places = [".".join(map(str, item.get("loc", ()))) for item in said]
        said = "; ".join(
            f"{place}: {item.get('msg')}" for place, item in zip(places, said, strict=True)
        )
    if said == "Not Found" or not said:  # what a framework says about a path that it does not know
        return None
    return said if isinstance(said, str) else json.dumps(said)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from the headers `retry-after-ms` and `retry-after` (seconds or a date)."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            pass
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError):
        return None


def _root(error: BaseException) -> str:
    """What the innermost cause says; `requests` keeps causes in `args`, urllib3 in `reason`."""
    while True:
        inside = (error.__cause__, getattr(error, "reason", None), *error.args)
        inner = next((cause for cause in inside if isinstance(cause, BaseException)), None)
        if inner is None:
            break
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def shown(data: bytes) -> str:
    """The beginning of a body, for messages."""
    return repr(data[:100].decode("utf-8", "replace")) + ("..." if len(data) > 100 else "")
