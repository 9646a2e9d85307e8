"""openpi's own client against a policy; run by the interpreter that it is installed for.

    python openpi_client_robot.py ws://127.0.0.1:8000 KEY ROWS FOLDER

FOLDER holds `observation.msgpack`, as our server's code would send it, and `actions.npy`, what the
published server answers. Each check prints its name; the first that fails ends the program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from openpi_client import msgpack_numpy
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.runtime.agents.policy_agent import PolicyAgent
from openpi_client.runtime.environment import Environment
from openpi_client.runtime.runtime import Runtime
from openpi_client.websocket_client_policy import WebsocketClientPolicy

URL, KEY, ROWS, FOLDER = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
OBSERVATION = msgpack_numpy.unpackb((FOLDER / "observation.msgpack").read_bytes())
ACTIONS = np.load(FOLDER / "actions.npy")
CHECKS: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Keep a check."""
    CHECKS.append(function)
    return function


def connected(path: str = "") -> WebsocketClientPolicy:
    """A client; the address may have a path."""
    return WebsocketClientPolicy(host=URL + path, api_key=KEY)


def near(found: Any, expected: Any) -> None:
    """The published actions, or some of them."""
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0)


@check
def metadata() -> None:
    """The first frame."""
    assert connected("/pi05").get_server_metadata()["action_horizon"] == len(ACTIONS)


@check
def chunks() -> None:
    """Whole chunks, with their timing."""
    client = connected()
    first, second = client.infer(OBSERVATION), client.infer(OBSERVATION)
    near(first["actions"], ACTIONS)
    near(second["actions"], ACTIONS)
    assert first["policy_timing"]["infer_ms"] > 0
    assert second["server_timing"]["prev_total_ms"] > 0


@check
def rows_of_chunks() -> None:
    """One action at a time, three chunks long."""
    broker = ActionChunkBroker(connected(), action_horizon=ROWS)
    for step in range(3 * ROWS):
        near(broker.infer(OBSERVATION)["actions"], ACTIONS[step % ROWS])
    broker.reset()
    near(broker.infer(OBSERVATION)["actions"], ACTIONS[0])


@check
def errors() -> None:
    """They are raised with our words, and the client can go on."""
    client = connected()
    for _ in range(2):
        try:
            client.infer({"prompt": "go"})
        except RuntimeError as error:
            said = str(error)
        assert said.startswith("Error in inference server:\n"), said
        assert "is missing" in said, said
        near(client.infer(OBSERVATION)["actions"], ACTIONS)


@check
def a_wrong_key() -> None:
    """It is refused at once."""
    said = ""
    try:
        WebsocketClientPolicy(host=URL, api_key="wrong")
    except Exception as error:
        said = str(error)
    assert "401" in said, said


@check
def several_robots() -> None:
    """At the same time."""

    def drive(_: int) -> None:
        client = connected()
        for _ in range(5):
            near(client.infer(OBSERVATION)["actions"], ACTIONS)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(drive, range(4)))


@check
def the_whole_runtime() -> None:
    """The control loop of the published examples."""

    class Arm(Environment):
        def __init__(self) -> None:
            self.taken: list[np.ndarray] = []

        def reset(self) -> None:
            pass

        def is_episode_complete(self) -> bool:
            return len(self.taken) >= 2 * ROWS

        def get_observation(self) -> dict[str, Any]:
            return dict(OBSERVATION)

        def apply_action(self, action: dict[str, Any]) -> None:
            self.taken.append(action["actions"])

    arm = Arm()
    agent = PolicyAgent(ActionChunkBroker(connected(), action_horizon=ROWS))
    Runtime(environment=arm, agent=agent, subscribers=[], max_hz=200).run()
    near(np.array(arm.taken), np.concatenate([ACTIONS[:ROWS]] * 2))


if __name__ == "__main__":
    for each in CHECKS:
        each()
        print(each.__name__)
