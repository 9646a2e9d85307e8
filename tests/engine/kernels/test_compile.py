"""Every Triton kernel compiles for real GPUs ahead of time, with no GPU here.

In a subprocess, because this process may run Triton as an interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Shared memory that one program may use, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}


def test_every_kernel_compiles_and_fits_on_every_architecture() -> None:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_compile.py")
    run = subprocess.run(
        [sys.executable, str(script), *map(str, SHARED_LIMIT)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert {result["arch"] for result in results} == set(SHARED_LIMIT)
    failed = [r for r in results if r.get("shared", 1 << 30) > SHARED_LIMIT[r["arch"]]]
    assert not failed, "\n".join(map(str, failed))
