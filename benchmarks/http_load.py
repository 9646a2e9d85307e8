"""Many streaming clients at once, some of which leave: does anything fail, leak or stall?

    python benchmarks/http_load.py [--seconds 60] [--clients 200] [--model every]

The server is a process of its own that serves as `mstar serve` does. `every` is the test model: it
emits chunks at the pace of speech; `orpheus-tiny` computes as fast as it can. The clients are two
processes more. `/health` is asked every 50 ms on a new connection, whether or not earlier answers
have come. Exits with 1 if anything failed or leaked; what was slow is only told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from urllib.request import urlopen

from http_load_clients import ask, clients, kinds

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2
PROBE_PAUSE, LAG_PAUSE = 0.05, 0.01  # seconds
AIM_MS = 100.0
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
POOL = (os.cpu_count() or 1) + 4  # threads by which asyncio's own pool may still grow


# -- the server's process ------------------------------------------------------------------------


def serve(model: str, port: int) -> None:
    """Serve until SIGTERM. `/lag` tells how late the event loop was since it was last asked."""
    sys.path.insert(0, str(ROOT))
    from mstar import Engine
    from mstar.http import create_app
    from mstar.http.server import Listening, serve_engine
    from mstar.models import registry

    registry._BUILTIN["every"] = "tests.every_modality:CARD"
    late: list[float] = []
    ticking: set[asyncio.Task] = set()

    async def tick() -> None:
        while True:
            due = time.monotonic() + LAG_PAUSE
            await asyncio.sleep(LAG_PAUSE)
            late.append(time.monotonic() - due)

    with Engine(model, warmup=True) as engine:
        app = create_app(engine)

        @app.get("/lag")
        async def lag() -> list[float]:
            if not ticking:
                ticking.add(asyncio.ensure_future(tick()))
            told = late.copy()
            late.clear()
            return told

        serve_engine(app, Listening(port=port))


@contextlib.contextmanager
def server(model: str):
    """A server process: its id, its port, and its folder for temporary files."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        command = [sys.executable, __file__, "--serve", str(port), "--model", model]
        environment = {**os.environ, "TMPDIR": folder}
        process = subprocess.Popen(command, env=environment, stderr=log)
        try:
            listens = False
            while not listens and process.poll() is None:
                time.sleep(0.1)
                with contextlib.suppress(OSError):
                    listens = bool(fetch(port, "/ready"))
            if listens:
                yield process.pid, port, Path(folder)
            process.terminate()
            code = process.wait(20)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = log.read().decode()
        good = code == 0 and "Traceback" not in said
        assert good, f"exit code {code}: {said[-4000:]}"


def fetch(port: int, path: str) -> str:
    with urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as reply:
        return reply.read().decode()


# -- watching ------------------------------------------------------------------------------------


def held(pid: int, port: int, folder: Path) -> dict[str, int]:
    """What the server holds."""
    files = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            files.append(os.readlink(link))
    figures = fetch(port, "/metrics")
    pages = re.findall(r'^mstar_kv_pages{.*state="used"} (\S+)', figures, re.M)
    live = re.findall(r"^mstar_requests_(?:running|waiting) (\S+)", figures, re.M)
    return {
        "requests": int(sum(map(float, live))),
        "pages": int(sum(map(float, pages))),
        "files": len(files),
        "sockets": sum(file.startswith("socket:") for file in files),
        "threads": len(list(Path(f"/proc/{pid}/task").iterdir())),
        "temporary files": sum(1 for _ in folder.rglob("*")),
    }


def resident(pid: int) -> float:
    """Memory in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def watch(pid: int, port: int, pipes: list) -> dict[str, list]:
    """Ask `/health` and read the memory until the clients have told what became of them."""
    asked, late, memory = [], [], []
    probes: set[asyncio.Task] = set()

    async def probe() -> None:
        began = time.monotonic()
        try:
            answer = await ask(
                port, b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
            )
            good = answer.startswith(b"HTTP/1.1 200")
        except OSError:
            good = False
        asked.append(time.monotonic() - began if good else float("inf"))

    began = due = time.monotonic()
    while not all(pipe.poll() for pipe in pipes):
        due += PROBE_PAUSE
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        late.append(time.monotonic() - due)
        probes = {task for task in probes if not task.done()} | {asyncio.create_task(probe())}
        if len(late) % 10 == 0:
            memory.append((time.monotonic() - began, resident(pid)))
    await asyncio.gather(*probes)
    return {"health": asked, "prober": late, "memory": memory}


def told(name: str, seconds: list[float], aim: bool = False) -> None:
    at = [1e3 * x for x in statistics.quantiles(seconds, n=100)]
    verdict = f" (aim p99 < {AIM_MS:g}: {'met' if at[98] < AIM_MS else 'missed'})" if aim else ""
    worst = 1e3 * max(seconds)
    print(f"  {name}: p50 {at[49]:.1f}, p99 {at[98]:.1f}, max {worst:.1f} ms{verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["every", "orpheus-tiny"], default="every")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warmup", type=float, default=15, help="seconds of load before that")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument(
        "--flat", type=float, default=2, help="MiB that memory may go up per 1,000 requests"
    )
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.model, options.serve)
    else:
        sys.exit(not load(options))


def load(options: argparse.Namespace) -> bool:
    """Do it and tell it; whether nothing failed or leaked."""
    context = multiprocessing.get_context("spawn")
    with server(options.model) as (pid, port, folder):
        pipes = []
        for seed in range(PROCESSES):
            pipe, other = context.Pipe()
            share = (options.clients + seed) // PROCESSES
            context.Process(
                target=clients, args=(other, port, options.model, share, seed), daemon=True
            ).start()
            pipes.append(pipe)

        def run(seconds: float) -> tuple[dict, Counter, list[str]]:
            for pipe in pipes:
                pipe.send(seconds)
            seen, (became, faults) = asyncio.run(watch(pid, port, pipes)), (Counter(), [])
            for pipe in pipes:
                more, wrong = pipe.recv()
                became += more
                faults += wrong
            return seen, became, faults

        def settled(at_most: dict[str, int] | None = None) -> dict[str, int]:
            """What is held once nothing runs, and no more than `at_most`; or after 10 s."""
            end = time.monotonic() + 10
            while True:
                now = held(pid, port, folder)
                most = at_most or {"requests": 0}
                if all(now[name] <= most[name] for name in most) or time.monotonic() > end:
                    return now
                time.sleep(0.2)

        fetch(port, "/lag")
        _, _, faults = run(options.warmup)
        before = settled()
        before["threads"] += POOL
        fetch(port, "/lag")
        seen, became, more = run(options.seconds)
        lag = json.loads(fetch(port, "/lag"))
        after = settled(before)
    for pipe in pipes:
        pipe.send(None)
    faults += more
    load_average = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    asked = sum(became.values())
    print(f"{options.model}: {options.clients} clients, {options.seconds:g} s; {asked} requests")
    for name in kinds(options.model):
        print(f"  {name}: {became[name, 'done']} done, {became[name, 'left']} left early")
    for fault, count in Counter(faults).most_common(10):
        print(f"  FAILED {count} times: {fault}")
    leaked = {name: (before[name], after[name]) for name in after if after[name] > before[name]}
    held_now = ", ".join(f"{count} {name}" for name, count in after.items())
    print(f"  held after it: {held_now} {'' if leaked else '(no more than before)'}")
    for name, (was, now) in leaked.items():
        print(f"  LEAKED {name}: {now} after, at most {was} before")
    times, sizes = zip(*seen["memory"], strict=True)
    slope = statistics.linear_regression(times, sizes).slope * times[-1] / asked * 1000
    flat = slope < options.flat
    print(f"  memory: {sizes[0]:.0f} to {sizes[-1]:.0f} MiB,", end=" ")
    print(f"{slope:+.2f} MiB per 1,000 requests ({'flat' if flat else 'NOT FLAT'})")
    told("/health", seen["health"], aim=True)
    told("event loop late by", lag)
    told("the prober itself late by", seen["prober"])
    print(f"  load average {load_average} on {os.cpu_count()} cores")
    return not faults and not leaked and flat


if __name__ == "__main__":
    main()
