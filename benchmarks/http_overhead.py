"""What HTTP adds to the engine: latency per request and per chunk, and throughput at 32 streams.

    python benchmarks/http_overhead.py

The model does nothing but emit 2,048 samples now and then, each chunk stamped with the time of its
emission. The same requests are run in this process and over loopback HTTP, in turn. The clients
are a process of their own and read raw sockets, so that what is measured is the server: a single
one waits in `recv`, as the caller in process waits for the engine; 32 share an asyncio loop. The
floor is a server that does nothing but write the same bytes from an event loop, told by another
thread. The last comparison is Orpheus (the tiny one), which really computes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import socket
import statistics
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import numpy as np
import uvicorn

try:
    from uvloop import run
except ModuleNotFoundError:
    from asyncio import run

from mstar import Engine
from mstar.engine.traps import sleep
from mstar.http import create_app
from mstar.http.server import Listening, config_of
from mstar.models import registry
from mstar.models.base import Model
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters

SAMPLES, RATE = 2048, 24000
REAL_TIME = SAMPLES / RATE
AIMS = {"first": 3.0, "chunk": 0.15, "throughput": 0.9}


class Metronome(Model):
    """Emits `count` chunks, `pause` seconds apart."""

    sample_rate = RATE
    nodes = ()

    @classmethod
    def load(cls, setup):
        return cls()

    def prepare(self, inputs, params, outputs):
        return inputs

    async def walk(self, request):
        for _ in range(request.params["count"]):
            await sleep(request.params["pause"])
            pcm = np.zeros(SAMPLES, np.int16)
            pcm[:4] = np.frombuffer(struct.pack("<d", time.monotonic()), np.int16)
            request.emit_audio(pcm, RATE)
        return "stop"


CARD = ModelCard(
    name="metronome",
    title="emits chunks at a steady pace",
    entry="benchmarks.http_overhead:Metronome",
    inputs=("text",),
    outputs=("audio",),
    parameters=Parameters(
        "metronome", [Parameter("count", int, 1), Parameter("pause", float, 0.0)]
    ),
    repos={},
)


def stamp_of(pcm: bytes) -> float:
    return struct.unpack("<d", pcm[:8])[0]


# A run: seconds to the first event, of every stream, and from emission to receipt, of every chunk.
Run = tuple[list[float], list[float]]


def in_process(engine: Engine, params: dict, streams: int) -> Run:
    def one(_: int) -> Run:
        began, first, late = time.monotonic(), [], []
        for event in engine.generate(text="x", stream=True, **params):
            now = time.monotonic()
            if len(event.pcm):
                first = first or [now - began]
                late.append(now - stamp_of(event.pcm[:4].tobytes()))
        return first, late

    with ThreadPoolExecutor(streams) as pool:
        runs = list(pool.map(one, range(streams)))
    return [x for first, _ in runs for x in first], [x for _, late in runs for x in late]


def request(params: dict) -> bytes:
    body = urlencode({"text": "x", "model_kwargs": json.dumps(params)}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/x-www-form-urlencoded\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def one_over_http(port: int, params: dict) -> Run:
    began, first, late = time.monotonic(), [], []
    with socket.create_connection(("127.0.0.1", port)) as wire:
        wire.sendall(request(params))
        kept = b""
        while piece := wire.recv(2**16):
            now = time.monotonic()
            *lines, kept = (kept + piece).split(b"\n")
            for line in lines:
                if line[:1] == b"{" and (data := json.loads(line)["data"]):
                    first = first or [now - began]
                    late.append(now - stamp_of(base64.b64decode(data[:12])))
    return first, late


async def many_over_http(port: int, params: dict, streams: int) -> Run:
    async def one() -> Run:
        began, first, late = time.monotonic(), [], []
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        writer.write(request(params))
        async for line in reader:
            now = time.monotonic()
            if line[:1] == b"{":  # not the size of an HTTP chunk
                data = json.loads(line)["data"]
                if data:
                    first = first or [now - began]
                    late.append(now - stamp_of(base64.b64decode(data[:12])))
        writer.close()
        return first, late

    runs = await asyncio.gather(*(one() for _ in range(streams)))
    return [x for first, _ in runs for x in first], [x for _, late in runs for x in late]


def clients(pipe) -> None:
    """The process of the clients: runs what it is told to."""
    while (job := pipe.recv()) is not None:
        port, params, streams = job
        began = time.monotonic()
        if streams == 1:
            run = one_over_http(port, params)
        else:
            run = asyncio.run(many_over_http(port, params, streams))
        pipe.send((run, time.monotonic() - began))


class Bench:
    def __init__(self, pipe) -> None:
        self.pipe = pipe

    def each(self, engine, ports, params, streams, rounds) -> list[tuple[Run, float]]:
        """In process and from every port, in turn: a run and its seconds each."""
        total: list[list] = [[([], []), 0.0] for _ in (engine, *ports)]
        for index in range(rounds + 1):
            began = time.monotonic()
            measured = [(in_process(engine, params, streams), time.monotonic() - began)]
            for port in ports:
                self.pipe.send((port, params, streams))
                measured.append(self.pipe.recv())
            if index:  # the first round warms up
                for sums, (run, seconds) in zip(total, measured, strict=True):
                    sums[0][0].extend(run[0])
                    sums[0][1].extend(run[1])
                    sums[1] += seconds
        return [tuple(sums) for sums in total]


def serve(engine: Engine) -> int:
    """A server on a thread, as `mstar serve` runs it; returns its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config_of(create_app(engine), Listening()))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    return listener.getsockname()[1]


def serve_bytes(count: int, pause: float) -> int:
    """The floor: chunks made by a thread, written by an event loop; returns its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    async def answer(reader, writer):
        loop = asyncio.get_running_loop()
        await reader.read(2**16)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

        def make():
            for _ in range(count):
                time.sleep(pause)
                data = base64.b64encode(
                    struct.pack("<d", time.monotonic()) + bytes(2 * SAMPLES - 8)
                )
                line = b'{"modality": "audio", "data": "%b", "metadata": {}}\n' % data
                loop.call_soon_threadsafe(writer.write, b"%x\r\n%b\r\n" % (len(line), line))
            loop.call_soon_threadsafe(writer.close)

        threading.Thread(target=make, daemon=True).start()

    async def main():
        await (await asyncio.start_server(answer, sock=listener)).serve_forever()

    threading.Thread(target=run, args=(main(),), daemon=True).start()
    return listener.getsockname()[1]


def ms(values: list[float]) -> float:
    return 1e3 * statistics.median(values)


def verdict(value: float, aim: float, *, least: bool = False) -> str:
    good = value >= aim if least else value <= aim
    return f"(aim {'>=' if least else '<='} {aim:g}: {'met' if good else 'missed'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    sys.modules.setdefault("benchmarks.http_overhead", sys.modules[__name__])
    registry._BUILTIN["metronome"] = "benchmarks.http_overhead:CARD"
    pipe, other = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=clients, args=(other,))
    process.start()
    bench = Bench(pipe)
    with Engine("metronome") as engine:
        port = serve(engine)
        steady = {"count": 50, "pause": 0.005}
        ports = [port, serve_bytes(**steady)]
        (inside, _), (outside, _), (floor, _) = bench.each(engine, ports, steady, 1, rounds)
        first = ms(outside[0]) - ms(inside[0])
        chunk = ms(outside[1]) - ms(inside[1])
        print(f"1 client, {rounds} requests of 50 chunks (medians)")
        print(f"  first event: in process {ms(inside[0]):.3f} ms, HTTP {ms(outside[0]):.3f} ms")
        print(f"  added to the first event: {first:.3f} ms {verdict(first, AIMS['first'])}")
        print(f"  a chunk: in process {ms(inside[1]):.3f} ms, HTTP {ms(outside[1]):.3f} ms")
        print(f"  added to a chunk: {chunk:.3f} ms {verdict(chunk, AIMS['chunk'])};", end=" ")
        print(f"the floor adds {ms(floor[1]) - ms(inside[1]):.3f} ms")
        paced = {"count": 36, "pause": REAL_TIME}
        (_, inside_s), (outside, outside_s) = bench.each(engine, [port], paced, 32, 1)
        ratio = inside_s / outside_s
        late = 1e3 * statistics.quantiles(outside[1], n=100)[98]
        print("32 streams at real time (85 ms chunks, 3 s)")
        print(f"  throughput of HTTP: {ratio:.3f} {verdict(ratio, AIMS['throughput'], least=True)}")
        print(f"  from emission to receipt, p99: {late:.1f} ms")
        flat_out = {"count": 500, "pause": 0.0}
        (_, inside_s), (outside, outside_s) = bench.each(engine, [port], flat_out, 32, 2)
        print("32 streams as fast as they go")
        print(f"  HTTP carries {len(outside[1]) / outside_s:,.0f} chunks/s,", end=" ")
        print(f"{len(outside[1]) / outside_s * REAL_TIME:,.0f} times real time")
    with Engine("orpheus-tiny") as engine:
        port = serve(engine)
        speech = {"max_tokens": 200, "ignore_eos": True}
        (_, inside_s), (_, outside_s) = bench.each(engine, [port], speech, 32, 2)
        ratio = inside_s / outside_s
        print(f"orpheus-tiny, 32 streams as fast as they go: throughput of HTTP {ratio:.3f}")
    pipe.send(None)
    process.join()


if __name__ == "__main__":
    main()
