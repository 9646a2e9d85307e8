"""Options of several commands, from what was typed to what is meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mstar.errors import InvalidRequest


def weight_places(items: list[str]) -> dict[str, str] | str | None:
    """`["PLACE"]` as one place, `["part=PLACE", ...]` as a dict."""
    pairs = [re.fullmatch(r"([A-Za-z_]\w*)=(.+)", item) for item in items]
    if not items:
        return None
    if len(items) == 1 and (pairs[0] is None or Path(items[0]).exists()):
        return items[0]
    if not all(pairs):
        raise InvalidRequest("--weights", items, "give one place, or part=place for every one")
    return unique("--weights", (pair.groups() for pair in pairs if pair))


def unique(field: str, pairs: Iterable[Iterable[str]]) -> dict[str, str]:
    """The pairs as a dict; a key that comes twice is refused in the name of `field`."""
    found: dict[str, str] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidRequest(field, f"{key}={value}", f"{key} is given twice")
        found[key] = value
    return found
