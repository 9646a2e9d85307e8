"""Robots that speak openpi's websocket protocol: its frames, its answers, its errors."""

from __future__ import annotations

import logging

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from mstar.http.msgpack_numpy import packb, unpackb
from tests.every_modality import every  # noqa: F401
from tests.http.policies import (
    FACTS,
    ROBOTS,
    actions,
    asked,
    golden_policy,
    joined,
    observation,
)
from tests.http.test_msgpack_numpy import BAD


@pytest.fixture(scope="module", params=ROBOTS)
def robot(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(tmp_path_factory, robot):
    with golden_policy(tmp_path_factory.mktemp(robot), robot) as site:
        yield site


# -- the protocol ------------------------------------------------------------------------------


def test_actions_are_those_published(policy, robot):
    with joined(policy.url) as connection:
        metadata = unpackb(connection.recv(10))
        assert metadata["robot"] == robot
        assert metadata["action_horizon"] == 10
        if robot == "aloha":
            assert metadata["reset_pose"] == FACTS["protocol"]["metadata"]["reset_pose"]
        first, second = (asked(connection, observation(robot)) for _ in range(2))
    for answer in (first, second):
        found, expected = answer["actions"], actions(robot)
        np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0)
        assert str(found.dtype) == FACTS[robot]["actions_dtype"]
        assert set(answer) == {*FACTS[robot]["response_keys"], "server_timing"}
        assert 0 < answer["policy_timing"]["infer_ms"] <= answer["server_timing"]["infer_ms"]
    assert set(first["server_timing"]) == set(FACTS["protocol"]["response1"]["server_timing"])
    assert set(second["server_timing"]) == set(FACTS["protocol"]["response2"]["server_timing"])
    assert second["server_timing"]["prev_total_ms"] > first["server_timing"]["infer_ms"]


@pytest.mark.parametrize("path", ["/", "/any/path?x=1", "/health", "/generate", "/v1/models"])
def test_it_is_on_every_path(libero, path):
    with joined(libero.url, path) as connection:
        assert "robot" in unpackb(connection.recv(10))


def test_plain_http_is_as_before(libero):
    reply = libero.get("/healthz")
    assert [reply.status_code, reply.text] == FACTS["protocol"]["healthz"]
    assert libero.get("/any/path").status_code == 404


def test_what_is_optional_may_be_left_out(libero):
    sent = observation("libero") | {"extra": np.zeros(3), "session": {"id": 7}, "when": None}
    with joined(libero.url) as connection:
        connection.recv(10)
        np.testing.assert_array_equal(
            asked(connection, sent)["actions"], asked(connection, observation("libero"))["actions"]
        )
        sent |= {"prompt": b"put the blue cup on the plate"}
        assert asked(connection, sent)["actions"].shape == (10, 7)


def test_observations_in_messages_of_several_frames(libero):
    frame = msgpack.packb({"prompt": "x" * 70_000})
    with joined(libero.url) as connection:
        connection.recv(10)
        connection.send([frame[:30_000], frame[30_000:]])
        assert "observation/image is missing" in connection.recv(10)


# -- errors ------------------------------------------------------------------------------------


def test_an_error_is_a_text_and_the_connection_goes_on(libero):
    with joined(libero.url) as connection:
        connection.recv(10)
        sent = observation("libero")
        del sent["observation/state"]
        said = asked(connection, sent)
        assert said.startswith("InvalidRequest: ")
        assert "observation/state is missing" in said
        answer = asked(connection, observation("libero"))
        assert "prev_total_ms" not in answer["server_timing"]
        np.testing.assert_allclose(answer["actions"], actions("libero"), atol=5e-5, rtol=0)


ODD = {
    "text": "hello",
    "no map": msgpack.packb([1, 2]),
    "nothing in it": msgpack.packb({}),
    "an image of text": {"observation/image": np.array(["x"])},
    "an image of one dimension": {"observation/image": np.zeros(3, np.uint8)},
    "an image without pixels": {"observation/image": np.zeros((0, 0, 3), np.uint8)},
    "an image of integers": {"observation/image": np.zeros((4, 4, 3), np.int32)},
    "an image that is no number": {"observation/image": np.full((4, 4, 3), np.nan, "f4")},
    "an image that is a path": {"observation/image": "/etc/hostname"},
    "an image that is a file": {"observation/image": b"\x89PNG\r\n\x1a\n"},
    "a state of text": {"observation/state": "x"},
    "a state that is not finite": {"observation/state": np.full(8, np.inf)},
    "a state of another length": {"observation/state": np.zeros(3)},
    "a state of times": {"observation/state": np.zeros(8, "M8[s]")},
    "a prompt that is a number": {"prompt": 3},
    "an extension": {"observation/state": msgpack.ExtType(5, b"x")},
}


@pytest.mark.parametrize("name", [*BAD, *ODD])
def test_a_bad_frame_costs_one_answer(libero, caplog, name):
    sent = BAD.get(name) or ODD[name] if name != "empty" else b""
    if isinstance(sent, dict):
        sent = packb(observation("libero") | sent)
    with joined(libero.url) as connection:
        connection.recv(10)
        said = asked(connection, sent)
        assert isinstance(said, str)
        assert said.startswith("InvalidRequest: "), said
        assert len(said) < 5000
        assert asked(connection, observation("libero"))["actions"].shape == (10, 7)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_message_that_is_too_long_closes_the_connection(libero):
    with joined(libero.url) as connection:
        connection.recv(10)
        connection.send(bytes(2**20 + 1))
        with pytest.raises(ConnectionClosed) as caught:
            connection.recv(10)
        assert caught.value.rcvd.code == 1009
    assert libero.get("/healthz").status_code == 200


def test_what_is_wrong_in_the_server_is_not_told(libero, monkeypatch, caplog):
    monkeypatch.setattr(libero.engine, "submit", lambda **_: 1 / 0)
    with joined(libero.url) as connection:
        connection.recv(10)
        assert asked(connection, observation("libero")) == "RequestFailed: internal server error"
        assert "ZeroDivisionError" in caplog.text
        monkeypatch.undo()
        assert asked(connection, observation("libero"))["actions"].shape == (10, 7)


def test_a_dead_engine_closes_the_connection(tmp_path):
    with golden_policy(tmp_path, "libero") as site, joined(site.url) as connection:
        connection.recv(10)
        site.engine.close()
        assert asked(connection, observation("libero")).startswith("EngineClosed: ")
        with pytest.raises(ConnectionClosed) as caught:
            connection.recv(10)
        assert caught.value.rcvd.code == 1011
        with pytest.raises(InvalidStatus, match="503"), joined(site.url):
            pass
