"""Clients that send slowly, or nothing, or take nothing: over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import requests
import uvicorn

from mstar import Engine
from mstar.http import create_app
from mstar.http.server import Listening, bind, config_of
from tests.every_modality import every  # noqa: F401
from tests.waiting import until

FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"
POST = b"POST /generate HTTP/1.1\r\nHost: a\r\n" + FORM


@dataclass
class Door:
    """A server with the limits of `mstar serve`, only narrower."""

    url: str
    server: uvicorn.Server
    loop: asyncio.AbstractEventLoop

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def connect(self, data: bytes = b"") -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=5)
        connection.sendall(data)
        return connection

    def health(self) -> int:
        return requests.get(f"{self.url}/health", timeout=5).status_code


@contextlib.contextmanager
def door(engine, *, body_timeout: float = 0.4, keep_alive: int = 1, **listening) -> Iterator[Door]:
    app = create_app(engine, body_timeout=body_timeout)
    config = config_of(app, Listening(**{"header_timeout": 0.4, **listening}))
    config.timeout_keep_alive = keep_alive
    server = uvicorn.Server(config)
    loops = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listener])
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left
        timers = [one for one in getattr(loops[0], "_scheduled", ()) if not one.cancelled()]
        assert not any("_end" in repr(one) or "abort" in repr(one) for one in timers)
        ended.append(True)

    ended: list[bool] = []
    with contextlib.closing(bind("127.0.0.1", 0)) as listener:
        listener.listen(256)
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        site = Door(f"http://127.0.0.1:{port}", server, loops[0])
        try:
            yield site
            until(lambda: site.connections == 0)
        finally:
            server.should_exit = True
            thread.join(10)
    assert ended


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    data = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def answered(connection: socket.socket) -> None:
    """Read the answer of `/health`."""
    data = b""
    while not data.endswith(b'"healthy"}'):
        data += connection.recv(65536)


def drip(connection: socket.socket, data: bytes, pause: float = 0.05) -> bytes:
    """Send byte by byte until the server has had enough; what it says."""
    with contextlib.suppress(OSError):
        for byte in data:
            connection.sendall(bytes([byte]))
            connection.settimeout(pause)
            with contextlib.suppress(TimeoutError):
                if piece := connection.recv(65536):
                    return piece
                return b""
    return b""


@pytest.fixture(scope="module")
def engine():
    from mstar.models import registry

    before = registry._BUILTIN.get("every")
    registry._BUILTIN["every"] = "tests.every_modality:CARD"
    with Engine("every") as engine:
        yield engine
    registry._BUILTIN.pop("every")
    if before is not None:
        registry._BUILTIN["every"] = before


def test_headers_that_drip_are_given_up(engine):
    with door(engine) as site:
        began = time.monotonic()
        said = drip(site.connect(), b"GET /health HTTP/1.1\r\nHost: " + b"a" * 1000)
        assert said.startswith(b"HTTP/1.1 408 ")
        assert 0.3 < time.monotonic() - began < 1.5


def test_headers_that_drip_on_a_used_connection_are_given_up(engine):
    with door(engine, keep_alive=5) as site:
        connection = site.connect(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        answered(connection)
        assert drip(connection, b"GET /" + b"a" * 1000).startswith(b"HTTP/1.1 408 ")
        connection = site.connect(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        answered(connection)
        connection.sendall(b"\r\n")  # which begins nothing
        assert b"408" in rest(connection)


def test_headers_without_end_are_given_up(engine):
    with door(engine, header_timeout=5) as site:
        connection = site.connect(b"GET / HTTP/1.1\r\n")
        said = b""
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b"a: " + b"b" * 4000 + b"\r\n")
                time.sleep(0.001)
        with contextlib.suppress(ConnectionResetError):
            said = connection.recv(65536)
        connection.close()
        assert said.startswith(b"HTTP/1.1 431 ") or said == b""


def test_a_body_that_drips_is_given_up(engine):
    with door(engine) as site:
        connection = site.connect(POST + b"Content-Length: 1000\r\n\r\n")
        assert drip(connection, b"text=" + b"x" * 900).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_drips_in_chunks_is_given_up(engine):
    with door(engine) as site:
        connection = site.connect(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        assert drip(connection, b"1\r\nx\r\n" * 200).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_drips_behind_an_answer_is_given_up(engine):
    with door(engine, keep_alive=5) as site:
        connection = site.connect(b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n")
        answered(connection)
        began = time.monotonic()
        assert drip(connection, b"x" * 900) == b""
        assert time.monotonic() - began < 1.5


def test_a_large_body_that_nobody_wants_does_not_hide_the_answer(engine):
    with door(engine, keep_alive=5, body_timeout=5) as site, requests.Session() as session:
        for _ in range(2):  # the connection is used again
            reply = session.post(f"{site.url}/nowhere", data=b"x" * 500_000, timeout=5)
            assert reply.status_code == 404
        last = session.get(f"{site.url}/health", timeout=5, headers={"connection": "close"})
        assert last.status_code == 200


def test_half_a_body_and_then_nobody(engine, caplog):
    with caplog.at_level("INFO", "mstar.http"), door(engine, body_timeout=30) as site:
        site.connect(POST + b"Content-Length: 1000\r\n\r\ntext=x").close()
        until(lambda: site.connections == 0)
        until(lambda: not site.server.server_state.tasks)
    (line,) = [one for one in caplog.records if one.name == "mstar.http"]
    assert line.levelname == "INFO"
    assert "the client has disconnected" in line.getMessage()


def test_connections_that_say_nothing_are_closed(engine):
    with door(engine) as site:
        assert rest(site.connect()) == b""
        connection = site.connect(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert rest(connection).count(b"HTTP/1.1") == 1


def test_who_takes_nothing_is_cut_off(engine):
    with door(engine) as site:
        body = b'text=%s&model_kwargs={"count": 400}' % (b"x" * 40_000)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = site.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        until(lambda: site.connections == 1)
        until(lambda: site.connections == 0)
        until(lambda: not site.server.server_state.tasks)
        connection.close()


def test_many_idle_connections_leave_room_for_others(engine):
    with door(engine, header_timeout=5, max_connections=100) as site:
        files = len(os.listdir("/proc/self/fd"))
        idle = [site.connect(b"GET /" if i % 2 else b"") for i in range(200)]
        assert site.health() == 200
        assert site.connections <= 100
        assert site.health() == 200
        for connection in idle:
            connection.close()
        until(lambda: site.connections == 0)
        until(lambda: len(os.listdir("/proc/self/fd")) <= files)


def test_many_half_bodies_leave_room_for_others(engine):
    with door(engine, body_timeout=30, max_connections=20) as site:
        half = POST + b"Content-Length: 1000\r\n\r\ntext=x"
        slow = [site.connect(half) for _ in range(40)]
        assert site.health() == 200
        for connection in slow:
            connection.close()


def test_live_requests_are_never_closed_to_make_room(engine):
    with door(engine, max_connections=3) as site:
        body = b'text=x&model_kwargs={"count": 60, "pause": 0.02}'
        head = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        live = [site.connect(head + body) for _ in range(3)]
        for connection in live:
            assert connection.recv(10) == b"HTTP/1.1 2"
        assert rest(site.connect()).startswith(b"HTTP/1.1 503 ")
        for connection in live:
            said = rest(connection)
            assert said.endswith(b"0\r\n\r\n")
            assert said.count(b'"modality"') > 60
        assert site.health() == 200


def test_slow_answers_and_pauses_between_requests_are_no_sin(engine):
    with door(engine, keep_alive=5) as site, requests.Session() as session:
        for _ in range(2):
            data = {"text": "x", "model_kwargs": '{"count": 3, "pause": 0.25}'}
            assert session.post(f"{site.url}/generate", data=data, timeout=5).status_code == 200
            time.sleep(0.5)  # longer than the time for headers, shorter than that of keep-alive
        assert site.connections == 1
