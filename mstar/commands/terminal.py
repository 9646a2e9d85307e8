"""What goes to the terminal, and whether there is one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def is_tty(stream: Any) -> bool:
    """Whether somebody looks at this stream; a closed one (None) is no terminal."""
    return stream is not None and stream.isatty()


def write(data: str | bytes) -> None:
    """Put it on stdout, at once."""
    if sys.stdout is None:
        raise OSError("standard output is closed")
    if isinstance(data, str):
        data = data.encode(sys.stdout.encoding or "utf-8", "replace")
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@contextmanager
def progress(*, enabled: bool) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, if that is a terminal; gives a function that sets its label."""
    if not enabled or not is_tty(sys.stderr):
        yield lambda label: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("generating", total=None)
        yield lambda label: bar.update(task, description=f"generating: {label}")


@contextmanager
def counter(total: int | None) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr, if that is a terminal; gives a function that sets its label and how many of
    `total` are done. It is drawn when that is called, and by no thread."""
    if not is_tty(sys.stderr):
        yield lambda label, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    options = {"transient": True, "redirect_stdout": False, "auto_refresh": False}
    with Progress(*columns, console=Console(stderr=True), **options) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda label, done: bar.update(task, description=label, completed=done, refresh=True)
