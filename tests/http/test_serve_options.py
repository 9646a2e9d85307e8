"""Whatever can be chosen in Python can be chosen on the command line of `mstar serve`."""

from __future__ import annotations

import inspect
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mstar import Engine
from mstar.cli import app
from mstar.errors import InvalidRequest
from mstar.http import server
from mstar.http.server import Listening
from mstar.http.settings import Settings

# Not to be chosen: a server always warms up before it listens, and whether a bar of progress is
# shown depends on there being a terminal.
NOT_CHOSEN = {"warmup", "progress"}
# Keyword -> what to type, what arrives.
ENGINE = {
    "weights": (["--weights", "a=b"], {"a": "b"}),
    "device": (["--device", "cpu"], "cpu"),
    "dtype": (["--dtype", "float32"], "float32"),
    "quantization": (["--quantization", "int8"], "int8"),
    "load_format": (["--load-format", "dummy"], "dummy"),
    "kv_tokens": (["--kv-tokens", "512"], 512),
    "memory_fraction": (["--memory-fraction", "0.5"], 0.5),
    "max_batch": (["--max-batch", "3"], 3),
    "token_budget": (["--token-budget", "64"], 64),
    "max_running": (["--max-running", "4"], 4),
    "max_queue": (["--max-queue", "5"], 5),
    "prefix_cache": (["--no-prefix-cache"], False),
    "look_ahead": (["--look-ahead"], True),
    "cpu_threads": (["--cpu-threads", "2"], 2),
    "options": (
        ["--option", "a=b=c", "--option", "n=-3", "--option", "f=true"],
        {"a": "b=c", "n": -3, "f": True},
    ),
}
APP = {
    "served_model_name": (["--served-model-name", "a", "--served-model-name", "b"], ["a", "b"]),
    "api_key": (["--api-key", "k"], "k"),
    "max_body_mb": (["--max-body-mb", "1.5"], 1.5),
    "request_timeout": (["--request-timeout", "7"], 7),
    "body_timeout": (["--body-timeout", "8"], 8),
    "cors_origins": (["--cors-origin", "http://a"], ["http://a"]),
    "allow_remote_media": (["--allow-remote-media"], True),
    "media_dir": (["--media-dir", "/tmp"], Path("/tmp")),
    "max_pixels": (["--max-pixels", "100"], 100),
    "max_audio_seconds": (["--max-audio-seconds", "9"], 9),
    "max_video_seconds": (["--max-video-seconds", "10"], 10),
    "max_video_frames": (["--max-video-frames", "11"], 11),
    "robot": (["--robot", "droid"], "droid"),
    "default_prompt": (["--default-prompt", "fold"], "fold"),
    "reset_pose": (["--reset-pose", "0,-1.5"], [0.0, -1.5]),
}
LISTENING = {
    "host": (["--host", "::1"], "::1"),
    "port": (["--port", "0"], 0),
    "log_level": (["--log-level", "debug"], "debug"),
    "drain_timeout": (["--drain-timeout", "1"], 1),
    "stats_interval": (["--log-stats", "2"], 2),
    "header_timeout": (["--header-timeout", "3"], 3),
    "max_connections": (["--max-connections", "4"], 4),
}


def served(monkeypatch, *options: str) -> dict[str, Any]:
    """What `mstar serve` passes on."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(server, "serve", lambda model, **kwargs: seen.update(kwargs))
    monkeypatch.setattr("mstar.models.registry.find", lambda *_: None)
    done = CliRunner().invoke(app, ["serve", "orpheus-tiny", *options])
    assert done.exit_code == 0, done.output
    return seen


def keywords(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_every_keyword_of_the_engine_can_be_chosen():
    assert set(ENGINE) == set(keywords(Engine.__init__)) - NOT_CHOSEN


def test_every_field_of_the_settings_can_be_chosen():
    assert set(APP) == {field.name for field in fields(Settings)}


def test_every_field_of_listening_can_be_chosen():
    assert set(LISTENING) == {field.name for field in fields(Listening)}


def test_what_is_not_chosen_is_as_in_python(monkeypatch):
    seen = served(monkeypatch)
    chosen = {name: v for name, v in keywords(Engine.__init__).items() if name not in NOT_CHOSEN}
    assert seen["engine_options"] == chosen
    assert seen["settings"] == Settings()
    assert seen["listening"] == Listening()


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group in ("ENGINE", "APP", "LISTENING") for name in globals()[group]],
)
def test_what_is_chosen_arrives(monkeypatch, group, name):
    typed, value = globals()[group][name]
    seen = served(monkeypatch, *typed)
    arrived = {
        "ENGINE": seen["engine_options"],
        "APP": vars(seen["settings"]),
        "LISTENING": asdict(seen["listening"]),
    }[group]
    assert arrived[name] == value


@pytest.mark.parametrize("name", ["header_timeout", "max_connections"])
def test_limits_of_connections_that_nothing_can_keep(name):
    with pytest.raises(InvalidRequest, match=name.replace("_", "-")):
        server.serve("x", listening=Listening(**{name: 0}), settings=Settings(), engine_options={})


@pytest.mark.parametrize(
    "typed", [["--option", "a"], ["--option", "a=1", "--option", "a=2"], ["--reset-pose", "0,x"]]
)
def test_what_cannot_be_read(typed):
    done = CliRunner().invoke(app, ["serve", "orpheus-tiny", *typed])
    assert done.exit_code == 2
    assert typed[0] in done.output


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("request_timeout", "0"),
        ("body_timeout", "-1"),
        ("max_body_mb", "nan"),
        ("max_pixels", "0"),
        ("max_audio_seconds", "0"),
        ("max_video_seconds", "0"),
        ("max_video_frames", "0"),
        ("media_dir", "/nowhere/at/all"),
    ],
)
def test_what_nothing_can_keep_is_refused_before_the_model_is_loaded(monkeypatch, option, value):
    called: list[str] = []
    monkeypatch.setattr(server, "serve", lambda model, **_: called.append(model))
    options = ["serve", "orpheus-tiny", "--" + option.replace("_", "-"), value]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 2, done.output
    assert f"error: {option}=" in done.stderr
    assert not called
