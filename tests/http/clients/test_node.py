"""openai-node and the Vercel AI SDK; skipped where there is no Node, or no packages for it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.waiting import until

SCRIPT = Path(__file__).with_name("node_clients.mjs")
PACKAGES = {
    "openai": "^6.49.0",
    "ai": "^6.0.326",
    "@ai-sdk/openai": "^3.0.141",
    "@ai-sdk/openai-compatible": "^2.0.91",
    "zod": "^4.6.7",
}
_INSTALL = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--loglevel=error"]


@pytest.fixture(scope="module")
def program(pytestconfig) -> Path:
    """The script, in a folder that has the packages; kept in pytest's cache."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    folder = pytestconfig.cache.mkdir("node-clients")
    wanted = json.dumps({"private": True, "dependencies": PACKAGES}, indent=2)
    package, done = folder / "package.json", folder / "installed"
    if not (done.exists() and done.read_text() == wanted):
        package.write_text(wanted)
        try:
            subprocess.run(
                _INSTALL, cwd=folder, check=True, capture_output=True, text=True, timeout=60
            )
        except subprocess.TimeoutExpired:
            pytest.skip("npm install took more than 60 s")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"npm install failed: {error.stderr.strip()[-200:]}")
        done.write_text(wanted)
    return Path(shutil.copy(SCRIPT, folder))


def test_openai_node_and_the_vercel_ai_sdk(program, site):
    done = subprocess.run(
        ["node", program.name, f"{site.url}/v1"],
        cwd=program.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = re.findall(r'^  async "(.*)"\(\)', SCRIPT.read_text(), re.M)
    assert len(checks) > 10
    assert [line for line in done.stdout.splitlines() if not line.startswith("#")] == checks
    until(lambda: site.engine.model.open_walks == 0)
