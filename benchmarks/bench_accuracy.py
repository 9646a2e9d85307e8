"""How true are the times that `mstar bench` tells? A server that knows when it wrote each piece.

    python benchmarks/bench_accuracy.py --streams 32

The server is a process of its own and streams chat completions; it writes down when each request
came and when each piece went out, by the same clock. Printed is what the tool measured minus the
truth, first with requests that arrive at random, then in lockstep: all start together, and pieces
go to all streams at once, as those of a continuous batch do. What the server is late in noting,
above all when requests come, is in the figures too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mstar.bench.load import Load
from mstar.bench.prompts import Prompt
from mstar.bench.report import spread
from mstar.bench.routes import Ask
from mstar.bench.run import Plan, run

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Pace:
    """`pieces` per answer, `gap` seconds apart, the first after `first` seconds; `together`: only
    at whole multiples of `gap` on the clock, so that all streams are written to at once."""

    pieces: int = 50
    first: float = 0.05
    gap: float = 0.02
    together: bool = False

    def after(self, now: float, seconds: float) -> float:
        """The time of a piece that is due `seconds` after `now`."""
        due = now + seconds
        return math.ceil(due / self.gap) * self.gap if self.together else due


class Writer(asyncio.Protocol):
    """Answers each request at its pace, and keeps a log: name -> came, written, written, ..."""

    def __init__(self, pace: Pace, log: dict[str, list[float]]) -> None:
        self.pace, self.log, self.data = pace, log, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        asyncio.get_running_loop().call_soon(self._take, time.perf_counter(), data)

    def _take(self, now: float, data: bytes) -> None:
        self.data += data
        head, _, body = self.data.partition(b"\r\n\r\n")
        if b"content-length: " not in head.lower():
            if head.startswith(b"GET"):
                self._document(json.dumps(self.log).encode())
            return
        if len(body) < int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]):
            return
        self.data = b""
        name = json.loads(body)["messages"][0]["content"]
        self.log[name] = [now]
        due = self.pace.after(now, self.pace.first)
        asyncio.get_running_loop().call_at(self._loop_time(due), self._write, name, due, 0)

    def _write(self, name: str, due: float, number: int) -> None:
        if number == 0:
            self.transport.write(HEAD)
        done = number == self.pace.pieces
        choice = {"index": 0, "delta": {} if done else {"content": "a"}}
        choice["finish_reason"] = "stop" if done else None
        data = b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
        if done:
            data += b"data: [DONE]\n\n"
        self.log[name].append(time.perf_counter())
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) + (b"0\r\n\r\n" if done else b""))
        if not done:
            due = self.pace.after(
                due, 0.99 * self.pace.gap if self.pace.together else self.pace.gap
            )
            loop = asyncio.get_running_loop()
            loop.call_at(self._loop_time(due), self._write, name, due, number + 1)

    def _loop_time(self, due: float) -> float:
        return asyncio.get_running_loop().time() + due - time.perf_counter()

    def _document(self, body: bytes) -> None:
        head = f"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


def serve(pace: Pace, pipe) -> None:
    """The process of the server; tells its port through the pipe."""

    async def main() -> None:
        log: dict[str, list[float]] = {}
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Writer(pace, log), "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextmanager
def server(pace: Pace) -> Iterator[str]:
    """Where it listens."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(pace, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def errors(pace: Pace, streams: int, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Measured minus true, in seconds, of every arrival of a piece (from its write), TTFT and ITL;
    and how late the tool was.

    `streams` are the requests at a time, on average where they arrive at random.
    """
    count = streams * rounds
    prompts = [Prompt(f"request {index}") for index in range(count)]
    with server(pace) as url:
        rate = None if pace.together else streams / (pace.first + pace.pieces * pace.gap)
        load = Load(streams, rate, count)
        plan = Plan(url, load, "chat", Ask(model="a"), prompts, warmup=streams)
        done = run(plan)
        with urllib.request.urlopen(f"{url}/log") as reply:
            log = json.load(reply)
    found: dict[str, list[float]] = {"arrival": [], "TTFT": [], "ITL": []}
    for trace in done.traces:
        came, *written = log[f"request {trace.index}"]
        assert trace.outcome == "done", trace.message
        assert len(trace.text) == pace.pieces
        found["arrival"] += [at - out for at, out in zip(trace.text, written, strict=False)]
        found["TTFT"].append((trace.text[0] - trace.sent) - (written[0] - came))
        for index in range(1, pace.pieces):
            measured = trace.text[index] - trace.text[index - 1]
            found["ITL"].append(measured - (written[index] - written[index - 1]))
    return found, done.lag


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for together in (False, True):
        found, lag = errors(Pace(together=together), args.streams, args.rounds)
        how = "in lockstep" if together else "at random"
        print(f"{args.streams} streams, 50 pieces/s each, {how}")
        for name, values in found.items():
            values = [1e3 * abs(value) for value in values]
            shown, good = spread(values), sum(v < 2 for v in values) / len(values)
            print(
                f"  error of {name}: p50 {shown['p50']:.3f} ms, p99 {shown['p99']:.3f} ms, "
                f"worst {shown['max']:.3f} ms, {good:.2%} < 2 ms"
            )
        print(f"  the tool was late by {1e3 * spread(lag)['p99']:.1f} ms (p99)")


if __name__ == "__main__":
    main()
