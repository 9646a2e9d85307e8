"""`mstar models`: what there is to run."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mstar.commands import terminal
from mstar.commands.errors import errors
from mstar.models import listing, registry


def models(
    name: Annotated[str | None, typer.Argument(help="Show all about this model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """List the models: what they take and make, their defaults, whether weights are here."""
    with errors(debug):
        rows = []
        for card in [registry.find(name).card] if name else registry.cards():
            rows.append(listing.row(card))
            if card.tiny is not None:
                rows.append(listing.row(card, tiny=True))
        if name in {row["name"] for row in rows}:
            rows = [row for row in rows if row["name"] == name]
        if as_json:
            terminal.write(json.dumps(rows[0] if name else rows, indent=2) + "\n")
        elif name:
            terminal.write(listing.details(rows[0]))
        else:
            terminal.write(listing.overview(rows))
