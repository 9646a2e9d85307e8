"""A policy as robots on the network see it: frames in, frames out, of openpi's protocol."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mstar.errors import InvalidRequest, RequestCancelled
from mstar.http.front import Front
from mstar.http.msgpack_numpy import packb, unpackb

__all__ = ["Seat", "ShownPolicy", "shown_policy"]

log = logging.getLogger("mstar.http")


def shown_policy(front: Front) -> ShownPolicy | None:
    """The policy of the engine, warm, for the robot of the settings; None if its model is none.

    Raises:
        InvalidRequest: there is no such robot, the policy cannot serve it, or there is no policy
            that could.
    """
    engine, settings = front.engine, front.settings
    try:
        own = engine.policy(settings.robot) if "action" in front.card.outputs else None
    except NotImplementedError:
        own = None
    if own is None:
        for name in ("robot", "default_prompt", "reset_pose"):
            if (value := getattr(settings, name)) is not None:
                raise InvalidRequest(name, value, f"{front.card.name} is no policy of a robot")
        return None
    robot = own.robot
    if settings.default_prompt is not None:
        robot = replace(robot, default_prompt=settings.default_prompt)
    if settings.reset_pose is not None:
        robot = replace(robot, reset_pose=tuple(settings.reset_pose))
    # Clients of the protocol say `prompt`, whatever the checkpoint calls it.
    shown = engine.policy(robot, {"prompt": robot.prompt})
    shown.warmup()
    try:
        shown.infer(shown.example(), seed=0)
    except InvalidRequest as error:
        if settings.robot is not None:
            raise
        log.warning("robots that connect by websocket will be refused: %s", error)
    pose = {"reset_pose": robot.reset_pose} if robot.reset_pose else {}
    return ShownPolicy(front, shown, packb({**shown.metadata, **pose}))


class ShownPolicy:
    """Answers observations. Any thread may use it.

    Args:
        policy: of `Engine.policy`.
        metadata: the first frame of every connection.
    """

    def __init__(self, front: Front, policy: Any, metadata: bytes) -> None:
        self._front, self._policy = front, policy
        self.metadata = metadata

    def answer(self, seat: Seat, frame: bytes | None, previous: float | None) -> bytes:
        """The frame that answers a frame.

        Args:
            seat: whose observation it is.
            frame: None if it was not a binary one.
            previous: seconds that the one before took, from its first byte here to its last.

        Raises:
            MStarError: there is no answer.
        """
        prompts = "prompt", self._policy.robot.prompt.replace(".", "/")
        observation = _harmless(_observation(frame), prompts)
        began = time.perf_counter()
        pending = self._policy.begin(observation, timeout=self._front.settings.request_timeout)
        chunk = seat.wait_for(pending)
        timing = {"infer_ms": 1e3 * (time.perf_counter() - began)}
        if previous is not None:
            timing["prev_total_ms"] = 1e3 * previous
        return packb(
            {
                "actions": chunk.actions.astype(np.float64),  # as clients know it
                "policy_timing": {"infer_ms": chunk.infer_ms},
                "server_timing": timing,
            }
        )


class Seat:
    """What one connection waits for; `cancel` ends it, and whatever would come after."""

    def __init__(self) -> None:
        self._gone = False
        self._pending: Any = None

    def wait_for(self, pending: Any) -> Any:
        """The result.

        Raises:
            MStarError: it failed, or was cancelled.
        """
        self._pending = pending
        try:
            if self._gone:
                pending.cancel()
                raise RequestCancelled("the client has gone")
            return pending.result()
        finally:
            self._pending = None

    def cancel(self) -> None:
        """The client has gone, or the server goes."""
        self._gone = True
        if (pending := self._pending) is not None:
            pending.cancel()


class Text:
    """Stands for text or bytes that are no prompt: an image must not be the name of a file of this
    machine, nor a file whose pixels nobody has counted."""


def _harmless(observation: Mapping[str, Any], prompts: Sequence[str], place: str = "") -> Any:
    """An observation with no text or bytes but the prompt."""
    found = {}
    for key, value in observation.items():
        name = f"{place}{key}".replace(".", "/")
        if isinstance(value, dict):
            value = _harmless(value, prompts, f"{name}/")
        elif isinstance(value, (str, bytes)) and name not in prompts:
            value = Text()
        found[key] = value
    return found


def _observation(frame: bytes | None) -> Mapping[str, Any]:
    if frame is None:
        raise InvalidRequest("observation", None, "must come as a binary frame, not as text")
    try:
        found = unpackb(frame)
    except ValueError as error:
        raise InvalidRequest("observation", None, str(error)) from None
    if not isinstance(found, dict):
        raise InvalidRequest("observation", None, f"is a {type(found).__name__}, not a map")
    return found
