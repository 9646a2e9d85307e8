"""The command line: `mstar generate`, `serve`, `models` and `bench`.

Text goes to stdout as it comes, everything else to stderr. Exit codes: 0 done, 1 failed, 2 asked
for something that cannot be, 130 interrupted. What can be refused is refused before the model is
loaded; torch is imported only when a model is. The commands are in `mstar.commands`.
"""

from __future__ import annotations

from typing import Annotated

import typer

import mstar
from mstar.commands.bench import bench
from mstar.commands.generate import generate
from mstar.commands.models import models
from mstar.commands.serve import serve

app = typer.Typer(
    help="Run composite, any-to-any multimodal models on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The `mstar` command."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"mstar {mstar.__version__}")
        raise typer.Exit


for command in (generate, serve, models, bench):
    app.command()(command)


if __name__ == "__main__":
    main()
