"""`--help` can be read in a terminal of 80 columns."""

from __future__ import annotations

import re

import click
import pytest
import typer
from typer.testing import CliRunner

from mstar.cli import app

COMMANDS = ["serve", "generate", "models", "bench"]


def shown(*words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=str)
def test_nothing_is_cut_off_or_too_wide(words):
    output = shown(*words)
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_there_by_its_whole_name(name):
    command = typer.main.get_command(app).commands[name]
    there = set(re.findall(r"--[\w-]+", shown(name)))
    for option in command.params:
        if isinstance(option, click.Option) or option.param_type_name == "option":
            assert {*option.opts, *option.secondary_opts} & there


@pytest.mark.parametrize(("name", "extra"), [("serve", "server"), ("bench", "async")])
def test_the_extra_is_named(name, extra):
    assert f"extra `{extra}`" in " ".join(shown(name).split())
