"""litellm, in a virtual environment of its own: it would change the versions of ours.

Fetching it takes half a minute or more, so this runs with `-m clients` only. `MSTAR_LITELLM_PYTHON`
names an interpreter that has it already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import until

SCRIPT = Path(__file__).with_name("litellm_client.py")
PACKAGE = "litellm>=1.106,<2"
VARIABLE = "MSTAR_LITELLM_PYTHON"
# No look at the network for prices of models.
_ENVIRONMENT = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""}


@pytest.fixture(scope="session")
def python(pytestconfig) -> str:
    """An interpreter that can import litellm; a new one is kept in pytest's cache."""
    if given := os.environ.get(VARIABLE):
        return given
    folder = pytestconfig.cache.mkdir("litellm")
    interpreter, done = folder / "bin" / "python", folder / "installed"
    if not (done.exists() and done.read_text() == PACKAGE):
        pip = [str(interpreter), "-m", "pip", "install", "-q", "--retries=1", PACKAGE]
        try:
            for command in ([sys.executable, "-m", "venv", str(folder)], pip):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
        except subprocess.TimeoutExpired:
            pytest.skip(f"installing {PACKAGE} took more than 240 s; set {VARIABLE}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"{PACKAGE} cannot be installed: {error.stderr.strip()[-200:]}")
        done.write_text(PACKAGE)
    return str(interpreter)


@pytest.mark.clients
def test_litellm(python, site):
    done = subprocess.run(
        [python, str(SCRIPT), f"{site.url}/v1"],
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    checks = re.findall(r"^@check\ndef (\w+)", SCRIPT.read_text(), re.M)
    assert len(checks) >= 6
    assert [line for line in done.stdout.splitlines() if line in checks] == checks
    until(lambda: site.engine.model.open_walks == 0)
