"""The fields of a chat request that become parameters of the model: their ranges, the value that
changes nothing, and the parameter that each sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mstar.errors import InvalidRequest
from mstar.http.openai.common import unsupported
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter

__all__ = ["FIELDS", "PARAMETER_FIELDS", "SHAPE", "parameter_of", "parameter_values"]

_MOST_STOPS = 4
_MOST_IDS = 1024
_MOST_ALTERNATIVES = 20


def _stop(value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > _MOST_STOPS:
        raise ValueError(f"must be a string or a list of up to {_MOST_STOPS}")
    if not all(isinstance(item, str) and item for item in strings):
        raise ValueError("must be strings that are not empty")
    return strings


def _token_ids(value: Any) -> list[int]:
    ok = isinstance(value, list) and len(value) <= _MOST_IDS
    if not ok or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise ValueError(f"must be a list of up to {_MOST_IDS} token ids")
    return value


def _logit_bias(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > _MOST_IDS:
        raise ValueError(f"must be an object of up to {_MOST_IDS} token ids")
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 11):
            raise ValueError(f"{token[:40]!r} is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {token} must be a number from -100 to 100")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return value


# The default is the value that changes nothing, so that a model may do without the field then.
_FIELDS = (
    Parameter("temperature", float, 1.0, low=0, high=2),
    Parameter("top_p", float, 1.0, low=0, low_open=True, high=1),
    Parameter("top_k", int, 0, low=-1, high=2**31 - 1),
    Parameter("min_p", float, 0.0, low=0, high=1),
    Parameter("repetition_penalty", float, 1.0, low=0, low_open=True, high=100),
    Parameter("presence_penalty", float, 0.0, low=-2, high=2),
    Parameter("frequency_penalty", float, 0.0, low=-2, high=2),
    Parameter("logit_bias", _logit_bias, {}),
    Parameter("seed", int, low=0, high=2**63 - 1),
    Parameter("stop", _stop, []),
    Parameter("stop_token_ids", _token_ids, []),
    Parameter("max_completion_tokens", int, low=1, high=2**31 - 1),
    Parameter("max_tokens", int, low=1, high=2**31 - 1),
    Parameter("min_tokens", int, 0, low=0, high=2**31 - 1),
    Parameter("ignore_eos", bool, False),
    Parameter("chat_template_kwargs", _object, {}),
)
_LIMITS = ("max_completion_tokens", "max_tokens")
_THINKING = "enable_thinking"  # the one thing of chat templates that models have a parameter for
_ALTERNATIVES = Parameter("top_logprobs", int, 0, low=0, high=_MOST_ALTERNATIVES)
_LOGPROBS = Parameter("logprobs", bool, False)
_TIERS = ("auto", "default", "flex", "scale", "priority", "fast")
# What shapes the answer.
SHAPE = (
    Parameter("n", int, 1, low=1, high=16),
    Parameter("stream", bool, False),
    Parameter("service_tier", str, "auto", choices=_TIERS),
    Parameter("parallel_tool_calls", bool, True),
)
FIELDS = (*_FIELDS, _LOGPROBS, _ALTERNATIVES, *SHAPE)
PARAMETER_FIELDS = tuple(p.name for p in (*_FIELDS, _LOGPROBS, _ALTERNATIVES))


def parameter_of(card: ModelCard, field: str) -> str | None:
    """The parameter that a field of OpenAI sets; `None` if the model has none."""
    own = "max_output_tokens" if field in _LIMITS else field
    return card.parameters[own].name if own in card.parameters else None


def parameter_values(
    card: ModelCard, fields: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters that the fields set, and which field sets each.

    Raises:
        InvalidRequest: a wrong type, out of range, or two fields that contradict each other.
        Refused: the model has no such parameter, and the value is not the neutral one.
    """
    values: dict[str, Any] = {}
    field_of: dict[str, str] = {}

    def put(name: str, value: Any, neutral: Any) -> None:
        own = parameter_of(card, name)
        if own is None:
            if value != neutral:
                raise unsupported(name, fields[name], f"{card.name} has nothing of the kind")
        elif own in values and values[own] != value:
            raise InvalidRequest(name, value, f"contradicts {field_of[own]}={values[own]}")
        elif value not in ([], {}):  # an empty list or object asks for nothing
            values[own], field_of[own] = value, name

    for field in _FIELDS:
        if field.name in fields:
            value = field.check(fields[field.name])
            if field.name == "top_k" and value == -1:  # what other servers say for all
                value = 0
            if field.name == "chat_template_kwargs" and _THINKING in value:
                own = parameter_of(card, _THINKING)
                if own is not None:
                    values[own], field_of[own] = value[_THINKING], f"{field.name}.{_THINKING}"
                    value = {name: value[name] for name in value if name != _THINKING}
            put(field.name, value, field.default)
    wanted = _LOGPROBS.check(fields.get("logprobs", False))
    count = _ALTERNATIVES.check(fields.get("top_logprobs", 0))
    if count and not wanted:
        raise InvalidRequest("top_logprobs", count, "needs logprobs=true")
    if wanted:
        put("logprobs", count, None)
    return values, field_of
