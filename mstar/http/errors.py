"""Errors on the wire: which status, and in which of the two shapes.

The native route says `{"detail": message}`, everything under /v1 says OpenAI's four keys.
"""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from mstar.errors import (
    ContextTooLong,
    EngineClosed,
    EngineOverloaded,
    InvalidRequest,
    ModelNotFound,
    MStarError,
    RequestCancelled,
    RequestTimeout,
)
from mstar.http.record import is_openai, record_of

__all__ = ["Refused", "error_response", "openai_error", "refusal", "saying", "told"]

RETRY_AFTER = 1
_LONGEST_NOTE = 200  # characters
_TYPES = {429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 413: "too_large"}
_STATUS = (
    (InvalidRequest, 400),
    (ModelNotFound, 404),
    (EngineOverloaded, 503),
    (EngineClosed, 500),
    (RequestTimeout, 504),
    (RequestCancelled, 499),
)


class Refused(Exception):
    """An answer that is not a success.

    Args:
        status: of HTTP.
        message: for people.
        param: the field at fault.
        code: OpenAI's word for it, where there is one.
        kind: name of the class in `mstar.errors`, for our own clients and the log.
        headers: to send along.
        reason: the message without what the client sent, for the log.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: dict[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status)
        self.kind, self.headers = kind, dict(headers or {})
        self.reason = reason or message
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_AFTER))

    @property
    def retry_after(self) -> int | None:
        """Seconds after which the client may try again."""
        return int(self.headers["retry-after"]) if "retry-after" in self.headers else None


def refusal(error: BaseException) -> Refused:
    """What to answer to an error, whatever it is."""
    if isinstance(error, Refused):
        return error
    if not isinstance(error, MStarError):
        return Refused(500, "internal server error", kind="RequestFailed")
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    kind = type(error).__name__
    if not isinstance(error, InvalidRequest):
        return Refused(status, saying(error), kind=kind)
    code = "context_length_exceeded" if isinstance(error, ContextTooLong) else None
    if error.field == "request_id":  # its form was checked before: another live request has it
        status = 409
    elif code is None and error.value is not None:
        code = "invalid_value"
    args = {"param": error.field, "code": code, "kind": kind, "reason": error.allowed}
    return Refused(status, saying(error), **args)


def told(error: BaseException, scope: dict[str, Any]) -> Refused:
    """`refusal`, with a note of it in the line of the log."""
    refused = refusal(error)
    param = refused.param and refused.param[:80]
    kind = refused.kind or refused.code or "Refused"
    record = record_of(scope)
    if record is not None:
        record.note(error=kind, param=param, message=refused.reason[:_LONGEST_NOTE])
    return refused


def saying(error: BaseException) -> str:
    """The message of an error; without `field=None` where there was no value."""
    if isinstance(error, InvalidRequest) and error.value is None:
        return f"{error.field}: {error.allowed}"
    return str(error) or type(error).__name__


def openai_error(refused: Refused) -> dict[str, Any]:
    """The error body with OpenAI's four keys."""
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": refused.message,
            "type": _TYPES.get(refused.status, kind),
            "param": refused.param,
            "code": refused.code,
        }
    }


def error_response(error: BaseException, scope: dict[str, Any]) -> JSONResponse:
    """The answer to an error, before the first byte of any other."""
    refused = told(error, scope)
    headers = dict(refused.headers)
    if refused.kind is not None:
        headers["x-mstar-error"] = refused.kind
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refused.status in (500, 504):
        headers["x-should-retry"] = "false"  # work was done, and would be done again
    body = openai_error(refused) if is_openai(scope) else {"detail": refused.message}
    return JSONResponse(body, status_code=refused.status, headers=headers)
