"""Many clients, some of which leave: nothing fails, and nothing is left behind.

`python benchmarks/http_load.py` is the long version, which also tells how slow it was.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mstar.engine.handle import Handle
from mstar.http.encoders import Coded

ROOT = Path(__file__).parents[2]
SPEECH = {"model": "every", "input": "hello", "voice": "Ethan", "pause": 0.005}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_nothing_fails_and_nothing_leaks_while_clients_come_and_go():
    command = [sys.executable, "benchmarks/http_load.py", "--clients", "24"]
    command += ["--seconds", "3", "--warmup", "2", "--flat", "1000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left early" in done.stdout


def alive(kind: type) -> int:
    return sum(type(thing) is kind for thing in gc.get_objects())


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("kind", [Handle, Coded])
def test_what_a_request_held_goes_without_the_garbage_collector(site, kind, leaves):
    gc.collect()
    before = alive(kind)
    gc.disable()
    try:
        body = {**SPEECH, "count": 1000 if leaves else 20}
        with site.post("/v1/audio/speech", json=body, stream=True) as reply:
            pieces = reply.iter_content(None)
            next(pieces)
            if not leaves:
                list(pieces)
        end = time.monotonic() + 5
        while alive(kind) > before and time.monotonic() < end:
            site.get("/health")
        assert alive(kind) <= before
    finally:
        gc.enable()
