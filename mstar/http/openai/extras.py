"""Fields that OpenAI does not know: parameters of the model, or ignored with one log line."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from mstar.errors import InvalidRequest
from mstar.models.card import ModelCard

__all__ = ["model_parameters"]

log = logging.getLogger("mstar.http")
# What OpenAI's clients send along with anything, and what changes nothing here.
_HARMLESS = ("metadata", "store", "user", "safety_identifier")


def model_parameters(
    card: ModelCard, fields: dict[str, Any], known: Collection[str]
) -> dict[str, Any]:
    """The fields beyond `known` that the model has as parameters, with those of `extra_body`.

    Raises:
        InvalidRequest: `extra_body` is no object.
    """
    nested = fields.get("extra_body")
    if nested is not None and not isinstance(nested, dict):
        raise InvalidRequest("extra_body", nested, "must be an object")
    found, ignored = {}, []
    for name, value in [*fields.items(), *(nested or {}).items()]:
        if name in known or name == "extra_body" or name in _HARMLESS:
            continue
        if name in card.parameters:
            found[name] = value
        else:
            ignored.append(repr(name[:40]))
    if ignored:
        log.warning("ignored fields that %s does not have: %s", card.name, ", ".join(ignored[:20]))
    return found
