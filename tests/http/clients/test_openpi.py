"""openpi's client, in a virtual environment of its own: it wants an older numpy than ours.

That takes some seconds once. `MSTAR_OPENPI_PYTHON` names an interpreter that has it already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mstar.http.msgpack_numpy import packb
from mstar.models.pi05.robots import PRESETS
from tests.http.policies import ROBOTS, actions, golden_policy, observation

SCRIPT = Path(__file__).with_name("openpi_client_robot.py")
# The client imports typing_extensions, and does not say so.
PACKAGES = ["openpi-client==0.1.2", "typing-extensions"]
VARIABLE = "MSTAR_OPENPI_PYTHON"


@pytest.fixture(scope="session")
def python(pytestconfig) -> str:
    """An interpreter that can import openpi_client; a new one is kept in pytest's cache."""
    if given := os.environ.get(VARIABLE):
        return given
    folder = pytestconfig.cache.mkdir("openpi")
    interpreter, done = folder / "bin" / "python", folder / "installed"
    if not (done.exists() and done.read_text() == " ".join(PACKAGES)):
        pip = [str(interpreter), "-m", "pip", "install", "-q", "--retries=0", "--timeout=10"]
        try:
            for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, *PACKAGES]):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            pytest.skip(f"installing openpi-client took more than 90 s; set {VARIABLE}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"openpi-client cannot be installed: {error.stderr.strip()[-200:]}")
        done.write_text(" ".join(PACKAGES))
    return str(interpreter)


@pytest.mark.parametrize("robot", ROBOTS)
def test_openpi_client(python, tmp_path, robot):
    (tmp_path / "observation.msgpack").write_bytes(packb(observation(robot)))
    np.save(tmp_path / "actions.npy", actions(robot))
    rows = min(PRESETS[robot].run, len(actions(robot)))
    with golden_policy(tmp_path / "policy", robot, api_key="secret") as site:
        url = site.url.replace("http://", "ws://")
        done = subprocess.run(
            [python, str(SCRIPT), url, "secret", str(rows), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    checks = re.findall(r"^@check\ndef (\w+)", SCRIPT.read_text(), re.M)
    assert len(checks) >= 7
    assert [line for line in done.stdout.splitlines() if line in checks] == checks
