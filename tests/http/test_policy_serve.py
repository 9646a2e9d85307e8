"""`mstar serve` of a policy, as a process: warm before it listens, and closed in good order."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner
from websockets.exceptions import ConnectionClosed

from mstar.cli import app
from mstar.http import server
from mstar.http.msgpack_numpy import unpackb
from tests.http.policies import asked, joined, observation, saved_by_openpi

SERVE = [sys.executable, "-m", "mstar.cli", "serve"]


def test_sigterm_closes_connections(tmp_path: Path):
    statistics = tmp_path / "assets" / "libero" / "norm_stats.json"
    saved_by_openpi(tmp_path, "libero")
    options = ["--robot", "libero", "--default-prompt", "wait", "--reset-pose", "0,-1.5"]
    options += ["--option", f"statistics={statistics}", "--option", "resize=openpi"]
    command = [*SERVE, "pi05-tiny", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if match := re.search(r"serving \S+ at (\S+)", line):
                    break
            assert match, "".join(lines)
            assumed = next(line for line in lines if "statistics: " in line)
            assert str(statistics) in assumed
            assert "resize rule: openpi" in assumed
            with joined(match[1]) as connection:
                metadata = unpackb(connection.recv(10))
                assert metadata["robot"] == "libero"
                assert metadata["reset_pose"] == [0, -1.5]
                sent = observation("libero")
                del sent["prompt"]
                assert asked(connection, sent)["actions"].shape == (10, 7)
                process.send_signal(signal.SIGTERM)
                with pytest.raises(ConnectionClosed) as caught:
                    connection.recv(10)
                assert caught.value.rcvd.code == 1012
            assert process.wait(10) == 0
            assert '"inferences": 1' in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["pi05-tiny", "--robot", "aloha"], "14 numbers"),
        (["pi05-tiny", "--robot", "spot"], "must be one of droid, libero, aloha"),
        (["pi05-tiny", "--option", "resize=large"], "resize"),
        (["pi05-tiny", "--option", "size=large"], "pi05 has statistics"),
        (["orpheus-tiny", "--option", "size=large"], "orpheus has none"),
        (["orpheus-tiny", "--robot", "droid"], "no policy"),
    ],
)
def test_what_cannot_be_served_is_one_line(monkeypatch, options, message):
    monkeypatch.setattr(server, "_log_to_stderr", lambda level: None)
    done = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert done.output.count("\n") == 1
