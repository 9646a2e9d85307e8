"""Who may connect as a robot, several at once, those that leave, and what is seen of them."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from mstar import Engine
from mstar.http.msgpack_numpy import packb, unpackb
from mstar.http.server import Listening
from tests.every_modality import every  # noqa: F401
from tests.http.policies import (
    asked,
    joined,
    observation,
    served,
)
from tests.waiting import until


def figure(site, name: str) -> float:
    lines = site.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


# -- who may connect ---------------------------------------------------------------------------


def test_the_key(libero, caplog):
    caplog.set_level(logging.INFO, "mstar.http")
    with served(libero.engine, api_key="secret") as site:
        for given in (None, "Api-Key wrong", "secret", "Basic secret", "Api-Key secretsecret"):
            headers = {} if given is None else {"Authorization": given}
            for path in ("/", "/health"):
                with pytest.raises(InvalidStatus) as caught:
                    joined(site.url, path, additional_headers=headers)
                assert caught.value.response.status_code == 401
                assert b"API key" in caught.value.response.body
        for given in ("Api-Key secret", "Bearer secret"):
            with joined(site.url, additional_headers={"Authorization": given}) as connection:
                assert "robot" in unpackb(connection.recv(10))
        assert site.get("/healthz").status_code == 200
    assert caplog.text.count('"status": 401') == 10
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_pages_of_strangers(libero):
    with pytest.raises(InvalidStatus, match="403"):
        joined(libero.url, origin="http://evil.example")
    with served(libero.engine, cors_origins=["http://robots.example"]) as site:
        with pytest.raises(InvalidStatus, match="403"):
            joined(site.url, origin="http://evil.example")
        with joined(site.url, origin="http://robots.example") as connection:
            assert "robot" in unpackb(connection.recv(10))


def test_models_that_do_not_act(every):  # noqa: F811
    with Engine(every) as engine, served(engine) as site:
        with pytest.raises(InvalidStatus) as caught:
            joined(site.url)
        assert caught.value.response.status_code == 404
        assert b"no policy" in caught.value.response.body
        assert site.get("/healthz").text == "OK\n"


# -- several, and those that leave --------------------------------------------------------------


def test_several_at_once_share_batches_and_get_what_each_would_get_alone(libero):
    count, times = 6, 4
    ready = threading.Barrier(count)

    def drive(_: int) -> list[np.ndarray]:
        with joined(libero.url) as connection:
            connection.recv(10)
            ready.wait(10)
            return [asked(connection, observation("libero"))["actions"] for _ in range(times)]

    before = dict(libero.engine.stats()["nodes"]["step"]["batch_sizes"])
    with joined(libero.url) as connection, ThreadPoolExecutor(count) as threads:
        connection.recv(10)
        alone = asked(connection, observation("libero"))["actions"]
        for found in threads.map(drive, range(count)):
            assert all(np.array_equal(each, alone) for each in found)
    after = libero.engine.stats()["nodes"]["step"]["batch_sizes"]
    assert any(size > 1 and n > before.get(size, 0) for size, n in after.items())


def test_one_that_waits_does_not_hold_up_the_loop(slow):
    with joined(slow.url) as connection:
        connection.recv(10)
        connection.send(packb(observation("libero")))
        until(lambda: slow.engine.stats()["requests"]["running"] == 1)
        began = time.monotonic()
        for _ in range(5):
            assert slow.get("/healthz").status_code == 200
        assert time.monotonic() - began < 1


@pytest.mark.parametrize("politely", [True, False])
def test_who_leaves_is_not_computed_for(slow, politely):
    before = slow.engine.stats()["requests"]["stopped"]
    with joined(slow.url) as connection:
        connection.recv(10)
        connection.send(packb(observation("libero")))
        until(lambda: slow.engine.stats()["requests"]["running"] == 1)
        if not politely:
            connection.socket.shutdown(2)
    until(lambda: slow.engine.stats()["requests"]["running"] == 0)
    until(lambda: slow.engine.stats()["requests"]["stopped"] == before + 1)
    until(lambda: not slow.app.state.front.live and not slow.app.state.front.busy)


def test_many_come_and_go(libero):
    for number in range(40):
        with joined(libero.url) as connection:
            connection.recv(10)
            if number % 4 == 0:
                asked(connection, observation("libero"))
    until(lambda: figure(libero, "mstar_policy_connections_open") == 0)
    assert not libero.app.state.front.live


def test_connections_that_make_no_room_for_others(libero):
    with served(libero.engine, Listening(max_connections=2), robot="libero") as site:
        with joined(site.url) as first, joined(site.url) as second:
            port = int(site.url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=5) as third:
                assert third.recv(100).startswith(b"HTTP/1.1 503 ")
            for connection in (first, second):
                connection.recv(10)
                assert asked(connection, observation("libero"))["actions"].shape == (10, 7)
        until(lambda: site.get("/health").status_code == 200)


def test_a_server_that_drains(slow):
    slow.engine.model.config = replace(slow.engine.model.config, num_inference_steps=50)
    with (
        served(slow.engine, robot="libero") as site,
        joined(site.url) as busy,
        joined(site.url) as idle,
    ):
        busy.recv(10)
        idle.recv(10)
        busy.send(packb(observation("libero")))
        until(lambda: site.engine.stats()["requests"]["running"] == 1)
        site.app.state.front.draining = True
        with pytest.raises(InvalidStatus, match="503"), joined(site.url):
            pass
        assert site.get("/healthz").status_code == 503
        assert unpackb(busy.recv(10))["actions"].shape == (10, 7)
        idle.send(packb(observation("libero")))
        for connection in (busy, idle):
            with pytest.raises(ConnectionClosed) as caught:
                connection.recv(10)
            assert caught.value.rcvd.code == 1012


# -- what is seen of it ------------------------------------------------------------------------


def test_one_line_in_the_log_and_figures(libero, caplog):
    caplog.set_level(logging.INFO, "mstar.http")
    done = 'mstar_policy_inferences_total{outcome="ok"}'
    before = figure(libero, done)
    with joined(libero.url, "/robot", additional_headers={"x-request-id": "arm-7"}) as connection:
        connection.recv(10)
        asked(connection, observation("libero"))
        asked(connection, b"")
        assert figure(libero, "mstar_policy_connections_open") == 1
    until(lambda: "arm-7" in caplog.text)
    (line,) = [r.getMessage() for r in caplog.records if "arm-7" in r.getMessage()]
    line = json.loads(line)
    assert (line["method"], line["path"], line["status"]) == ("WEBSOCKET", "/robot", 101)
    assert (line["inferences"], line["errors"], line["close_code"]) == (1, 1, 1000)
    assert figure(libero, done) == before + 1
    assert figure(libero, "mstar_policy_inference_seconds_count") > 0
