"""What there is to know about the models of the registry, as tables for people."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from mstar.engine.hub import is_cached
from mstar.models.card import ModelCard

__all__ = ["details", "overview", "row"]


def row(card: ModelCard, *, tiny: bool = False) -> dict[str, Any]:
    """What the table says about one model, as plain data."""
    cached = {part: is_cached(repo) for part, repo in card.repos.items()}
    have = [part for part, there in cached.items() if there]
    state = "cached" if all(cached.values()) else f"partly cached ({', '.join(have)})"
    sources = card.tiny_sources() if tiny else card.repos
    return {
        "name": f"{card.name}-tiny" if tiny else card.name,
        "title": f"{card.title} (tiny test checkpoint)" if tiny else card.title,
        "inputs": list(card.inputs),
        "outputs": list(card.outputs),
        "default_output": list(card.default_output),
        "weights": "shipped" if tiny else state if have else "not downloaded",
        "sources": {part: str(source) for part, source in sources.items()},
        "parameters": card.parameters.describe(),
    }


def overview(rows: list[dict[str, Any]]) -> str:
    """All models, a line each, with the defaults of their parameters."""
    table = [("MODEL", "TAKES -> MAKES", "WEIGHTS", "")]
    table += [(row["name"], _flow(row), row["weights"], row["title"]) for row in rows]
    lines = _columns(table)
    text = [lines[0]]
    for row, line in zip(rows, lines[1:], strict=True):
        text.append(line)
        if row["weights"] != "shipped":
            defaults = " ".join(f"{p['name']}={_plain(p['default'])}" for p in row["parameters"])
            text += textwrap.wrap(defaults, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(text) + "\n"


def details(row: dict[str, Any]) -> str:
    """One model with all of its parameters."""
    table = [("PARAMETER", "TYPE", "DEFAULT", "ALLOWED")]
    table += [(p["name"], p["type"], _plain(p["default"]), p["allowed"]) for p in row["parameters"]]
    head, *lines = _columns(table)
    text = [f"{row['name']}: {row['title']}", f"{_flow(row)}; weights: {row['weights']}"]
    text += [f"  {part}: {source}" for part, source in row["sources"].items()]
    text += ["", head]
    for parameter, line in zip(row["parameters"], lines, strict=True):
        also = f" (also: {', '.join(parameter['aliases'])})" if parameter["aliases"] else ""
        text += [line, f"    {parameter['help']}{also}"]
    return "\n".join(text) + "\n"


def _flow(row: dict[str, Any]) -> str:
    return f"{', '.join(row['inputs'])} -> {', '.join(row['outputs'])}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _columns(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
