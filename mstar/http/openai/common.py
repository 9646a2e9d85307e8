"""What OpenAI's routes share: nested and unknown fields, refusals, events of a stream."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mstar.errors import InvalidRequest
from mstar.http.errors import Refused, openai_error, saying, told
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter

__all__ = [
    *("data_event", "error_event", "flat", "model_parameters", "renamed", "schema_of"),
    *("unsupported", "voice_of"),
]

log = logging.getLogger("mstar.http")
# They tell OpenAI's own service something and change nothing here.
_IGNORED = (
    *("metadata", "store", "user", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_options", "prompt_cache_retention", "verbosity", "reasoning_effort"),
    *("prediction", "moderation", "web_search_options"),
)


_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields that are given, with those that some clients nest in `extra_body`.

    Raises:
        InvalidRequest: `extra_body` is no object, or says something else than a field beside it.
    """
    nested = fields.get("extra_body")
    if nested is not None and not isinstance(nested, dict):
        raise InvalidRequest("extra_body", nested, "must be an object")
    given = {name: value for name, value in fields.items() if value is not None}
    given.pop("extra_body", None)
    for name, value in (nested or {}).items():
        if given.get(name, value) != value:
            raise InvalidRequest(f"extra_body.{name[:40]}", value, "is given twice")
        if value is not None:
            given[name] = value
    return given


def model_parameters(
    card: ModelCard, fields: Mapping[str, Any], known: Collection[str]
) -> dict[str, Any]:
    """The fields beyond `known` that the model has as parameters; the rest is ignored with one
    line in the log."""
    others = {name: value for name, value in fields.items() if name not in known}
    found = {name: value for name, value in others.items() if name in card.parameters}
    ignored = [repr(name[:40]) for name in others if name not in found and name not in _IGNORED]
    if ignored:
        log.warning("ignored fields that %s does not have: %s", card.name, ", ".join(ignored[:20]))
    return found


def voice_of(value: Any, field: str) -> str | None:
    """A voice: a string, or an object with an id."""
    name = value.get("id", 0) if isinstance(value, dict) else value
    if name is not None and not isinstance(name, str):
        raise InvalidRequest(field, value, 'must be a string or {"id": ...}')
    return name


def unsupported(field: str, value: Any, allowed: str) -> Refused:
    """The answer to a field that is known, but that the model cannot honour."""
    message = saying(InvalidRequest(field, value, allowed))
    return Refused(400, message, param=field, code="unsupported_parameter", kind="InvalidRequest")


def renamed(error: Exception, field_of: Mapping[str, str]) -> Exception:
    """An error about an argument of the engine, told about the client's field that set it."""
    if isinstance(error, InvalidRequest) and error.field in field_of:
        return type(error)(field_of[error.field], error.value, error.allowed)
    return error


def schema_of(parameters: Iterable[Parameter]) -> dict[str, Any]:
    """The properties of a JSON schema."""
    schemas: dict[str, Any] = {}
    for one in parameters:
        told = {
            "type": _TYPES.get(one.kind),
            "enum": one.choices,
            "exclusiveMinimum" if one.low_open else "minimum": one.low,
            "maximum": one.high,
            "default": one.default,
            "description": one.help,
        }
        schemas[one.name] = {k: value for k, value in told.items() if value not in (None, "", ())}
    return schemas


def data_event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One event of a stream."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


def error_event(error: Exception, scope: dict[str, Any]) -> bytes:
    """The last event of a stream that failed."""
    return data_event(openai_error(told(error, scope)))
