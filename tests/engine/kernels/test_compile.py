"""Every Triton kernel compiles for real GPUs ahead of time, with no GPU here.

In a subprocess, because this process may run Triton as an interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mstar.engine import kernels

# Shared memory that one program may use, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {90: 227 * 1024, 80: 163 * 1024, 120: 99 * 1024}
STACK_LIMIT = 128  # bytes per thread; a sine takes 32
IN_REGISTERS = {"_decode_kernel", "_extend_kernel"}  # on their loops hangs most
PACKAGE = Path(kernels.__file__).parent


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
    written = {
        name
        for file in PACKAGE.glob("*.py")
        for name in re.findall(
            r"^@jit(?:\(.*\))?\ndef (\w+_kernel)\(", file.read_text(), re.MULTILINE
        )
    }
    for arch in SHARED_LIMIT:
        assert {result["kernel"] for result in results if result["arch"] == arch} == written
    failed = [
        r
        for r in results
        if "error" in r
        or r["shared"] > SHARED_LIMIT[r["arch"]]
        or r["stack"] > (0 if r["kernel"] in IN_REGISTERS else STACK_LIMIT)
    ]
    assert not failed, "\n".join(map(str, failed))
