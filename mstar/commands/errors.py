"""Exceptions as users of a shell meet them: one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from mstar.errors import InvalidRequest, ModelNotFound, MStarError


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Make warnings, and errors that users can understand, one line; set the exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
            yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader has gone: say nothing, also not at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (MStarError, OSError) as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {in_words(error)}", err=True)
        refused = isinstance(error, (InvalidRequest, ModelNotFound))
        raise typer.Exit(2 if refused else 1) from None


def in_words(error: Exception) -> str:
    """The error on one line."""
    text = str(error)
    if isinstance(error, InvalidRequest) and error.value is None:
        text = f"{error.field}: {error.allowed}"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__
