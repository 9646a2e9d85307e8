"""Options of several commands, from what was typed to what is meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from mstar.errors import InvalidRequest

# What options hold, or may hold.
Text, Texts = str | None, list[str] | None
Count, Number = int | None, float | None
File, Files = Path | None, list[Path] | None


def option(help: str, *names: str, **more: Any) -> Any:
    """`typer.Option`, its help first."""
    return typer.Option(*names, help=help, **more)


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


def model_options(items: list[str]) -> dict[str, str | int | bool] | None:
    """`["key=value", ...]` as a dict, with whole numbers, true and false as what they say."""
    for item in items:
        if not re.match(r"[A-Za-z_]\w*=", item):
            raise InvalidRequest("--option", item, "must be key=value")
    pairs = unique("--option", (item.split("=", 1) for item in items))
    return {key: _plain(value) for key, value in pairs.items()} or None


def numbers(field: str, text: str | None) -> list[float] | None:
    """`"0,-1.5"` as numbers."""
    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise InvalidRequest(field, text, "must be numbers with commas between them") from None


def _plain(text: str) -> str | int | bool:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text


def unique(field: str, pairs: Iterable[Iterable[str]]) -> dict[str, str]:
    """The pairs as a dict; a key that comes twice is refused in the name of `field`."""
    found: dict[str, str] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidRequest(field, f"{key}={value}", f"{key} is given twice")
        found[key] = value
    return found
