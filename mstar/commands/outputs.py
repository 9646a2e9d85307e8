"""Where `mstar generate` writes, and what: decided and refused before a model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mstar.commands import terminal
from mstar.errors import InvalidRequest
from mstar.io.save import HOLDS, check_path, modalities_of
from mstar.models.card import ModelCard

STDOUT = Path("-")
# What a pipe gets, as the extension of a file.
PIPED = {"text": ".txt", "image": ".png", "audio": ".wav", "action": ".npy", "latent": ".npy"}


def modalities(
    card: ModelCard,
    asked: str | None,
    outs: list[Path],
    plot: Path | None = None,
    drawn: str = "action",
) -> tuple[str, ...]:
    """What to make: as asked, else what the output files hold, else the model's default.

    Args:
        drawn: what a plot shows.
    """
    makes = f"{card.name} makes {', '.join(card.outputs)}"
    if asked is not None:
        kinds = [kind.strip() for kind in asked.split(",")]
        for kind in kinds:
            if kind not in card.outputs:
                raise InvalidRequest("--modality", kind, makes)
    else:
        kinds = [held_by(path)[0] for path in outs if len(held_by(path)) == 1]
        if plot is not None and drawn in card.outputs:
            kinds.append(drawn)
        for path in outs:
            if not set(held_by(path)) & set(card.outputs):
                held = ", ".join(held_by(path))
                raise InvalidRequest("--out", str(path), f"such a file holds {held}; {makes}")
    return tuple(dict.fromkeys(kinds)) or card.default_output


def held_by(path: Path) -> tuple[str, ...]:
    """The modalities that an output can hold."""
    if path == STDOUT:
        return tuple(PIPED)
    with as_out():
        return modalities_of(path)


def check_outs(
    kinds: tuple[str, ...],
    outs: list[Path],
    *,
    force: bool,
    as_json: bool,
    plot: Path | None = None,
    drawn: str = "action",
) -> None:
    """Refuse outputs that cannot be written, before any work is done."""
    if plot is not None:
        _check_plot(kinds, outs, plot, force, drawn)
    for kind in kinds:
        if kind == drawn and plot is not None:
            continue
        if kind != "text" and not any(kind in held_by(path) for path in outs):
            fitting = " ".join(suffix for suffix, held in HOLDS.items() if kind in held)
            pipe = PIPED[kind].removeprefix(".").upper()
            raise InvalidRequest(
                "--out",
                None,
                f"{kind} needs a file to go to: -o NAME with one of {fitting}; "
                f"or -o - to send {pipe} bytes to a pipe",
            )
    if STDOUT in outs and (as_json or len(kinds) > 1):
        raise InvalidRequest("--out", "-", "a pipe takes one modality, and no --json beside it")
    if STDOUT in outs and kinds != ("text",) and terminal.is_tty(sys.stdout):
        raise InvalidRequest("--out", "-", "stdout is a terminal; send it to a pipe or a file")
    for path in outs:
        if not any(kind in kinds for kind in held_by(path)):
            raise InvalidRequest("--out", str(path), f"cannot hold {', '.join(kinds)}")
        if outs.count(path) > 1:
            raise InvalidRequest("--out", str(path), "is given twice")
        if path != STDOUT:
            with as_out():
                check_path(path, overwrite=force)


def _check_plot(
    kinds: tuple[str, ...], outs: list[Path], plot: Path, force: bool, drawn: str
) -> None:
    if drawn not in kinds:
        raise InvalidRequest("--plot", str(plot), f"draws {drawn}s; what is made is {kinds[0]}")
    if plot.suffix.lower() != ".png":
        raise InvalidRequest("--plot", str(plot), "is drawn as a .png")
    if plot in outs:
        raise InvalidRequest("--plot", str(plot), "is an output already")
    with as_out("--plot"):
        check_path(plot, overwrite=force)


@contextmanager
def as_out(option: str = "--out") -> Iterator[None]:
    """Name the option in the errors about an output file."""
    try:
        yield
    except FileExistsError as error:
        hint = "exists already; --force overwrites it"
        raise InvalidRequest(option, error.filename, hint) from None
    except InvalidRequest as error:
        if error.field not in ("path", "format"):
            raise
        raise InvalidRequest(option, error.value, error.allowed) from None
