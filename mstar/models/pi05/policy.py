"""A policy as robot programs call it: observations in, actions out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mstar.models.control.action_queue import lengthened
from mstar.models.control.pending import Pending
from mstar.models.parameters import demand, positive
from mstar.models.pi05.observation import split
from mstar.models.pi05.robots import Robot

__all__ = ["RobotPolicy"]

_LONGEST = 1e9  # of a deadline, in milliseconds


class RobotPolicy:
    """One robot's view of an Engine that serves pi0.5; made by `Engine.policy`.

    Any thread may use it, but for `select_action`, which belongs to one control loop. Several
    policies may share an Engine.

    Args:
        engine: the Engine.
        robot: what `robots.robot_for` takes, or None for the names of the checkpoint.
        rename: key of an observation -> the key that the robot's convention has for it.

    Raises:
        InvalidRequest: nobody knows the robot, or the policy was made for another one.
    """

    def __init__(
        self,
        engine: Any,
        robot: str | Mapping[str, Any] | Robot | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> None:
        model = engine.model
        self.engine = engine
        self.processor = model.processor
        self.config = model.config
        found = model.robot(robot)
        self._check_fits(found)
        fits = isinstance(rename, Mapping | None)
        demand(fits, "rename", rename, "must be a map from names to names")
        self.robot = replace(found, rename={**found.rename, **(rename or {})})
        self._queue: deque[np.ndarray] = deque()

    @property
    def metadata(self) -> dict[str, Any]:
        """What a program may want to know: shapes, rates, names."""
        robot = self.robot
        return {
            "model": self.engine.name,
            "robot": robot.name,
            "action_horizon": self.config.chunk_size,
            "action_dim": robot.action_dim or self.processor.action_dim,
            "cameras": dict(robot.images),
            "state": dict(robot.state),
            "delta": list(robot.delta),
            "fps": robot.fps,
            "assumed": self.processor.assumed,
        }

    def infer(
        self,
        obs: Mapping[str, Any],
        *,
        noise: Any = None,
        seed: int | None = None,
        deadline_ms: float | None = None,
        raw: bool = False,
        **params: Any,
    ) -> dict[str, Any]:
        """Actions for an observation.

        Args:
            obs: nested or flat, of arrays of any library, in the robot's convention.
            noise: start noise `[horizon, 32]`.
            seed: of the noise, where none is given.
            deadline_ms: milliseconds until the result must be there.
            raw: actions in the model's normalised space.
            **params: of the model.

        Returns:
            `{"actions": float32 [horizon, action_dim], "policy_timing": {"infer_ms": ...}}`.

        Raises:
            InvalidRequest: the observation is not what the robot's should be; all faults are named.
            DeadlineExceeded: it took too long. The engine is free for the next observation as soon
                as what it is in the middle of is done: reading the observation, or one step of the
                flow; on a GPU, the call.
        """
        params |= {"noise": noise, "seed": seed}
        chunk = self.begin(obs, deadline_ms=deadline_ms, raw=raw, **params).result()
        actions = chunk.original if raw else chunk.actions
        return {"actions": actions, "policy_timing": {"infer_ms": chunk.infer_ms}}

    def begin(
        self,
        obs: Mapping[str, Any],
        *,
        deadline_ms: float | None = None,
        raw: bool = False,
        **params: Any,
    ) -> Pending:
        """Lay an observation out and queue it; `infer` in two parts.

        Raises:
            InvalidRequest, DeadlineExceeded: see `infer`.
        """
        began = time.monotonic()
        if deadline_ms is not None:
            deadline_ms = positive("deadline_ms", deadline_ms, _LONGEST)
        if not raw:
            self.processor.check_robot_units()
        observed = self.robot.observe(obs)
        handle = self.engine.submit(
            text=observed.prompt,
            images=dict(observed.images),
            robot_state=observed.state,
            output_modalities=("action",),
            stream=False,
            **{**params, "raw": True},
        )
        return Pending(self.for_robot, handle, observed.state, deadline_ms, began)

    def for_robot(self, original: np.ndarray, state: np.ndarray) -> np.ndarray | None:
        """What the robot takes, of actions in the model's space; None without statistics.

        Args:
            original: `[rows, dims]`.
            state: `Chunk.state`.
        """
        if not self.processor.of_actions.known:
            return None
        finished = self.processor.finish(original, state)
        return self.robot.act(finished, state).astype(np.float32)

    def previous(self, left: np.ndarray, then: np.ndarray, obs: Any, rows: int) -> np.ndarray:
        """What is left of a chunk, as real-time chunking takes it: in the model's space and, where
        actions are relative to the state, to that of a new observation.

        Args:
            left: rows of `Chunk.original`.
            then: `Chunk.state`.
            obs: the observation that the next chunk is for.
            rows: how many are needed; the last one is repeated where there are fewer.

        Returns:
            Float32 `[rows, action_dim]`.
        """
        delta = self.robot.delta
        if self.processor.relative is None and not delta:
            return lengthened(left, rows)
        now = self.robot.observe(obs).state
        finished = self.processor.finish(left, then)
        if delta:
            finished = finished.copy()
            moved = (then - now)[: len(delta)]
            finished[:, : len(delta)] += np.where(delta, moved, 0)
        return self.processor.previous(finished, now, rows)

    def reset(self) -> None:
        """A new episode begins: forget rows that were not taken yet."""
        self._queue.clear()

    def warmup(self) -> dict[str, float]:
        """Run once what an observation runs. Nothing is compiled or captured afterwards, but for
        flows with another number of steps than the checkpoint's.

        Returns:
            Seconds of the first run and of one after it.
        """
        self.engine.warmup()
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            self.infer(self.example(), seed=0, raw=True)
            seconds.append(time.perf_counter() - began)
        return {"first_s": seconds[0], "warm_s": seconds[1]}

    def example(self) -> dict[str, Any]:
        """An observation of this robot that shows nothing: black images, a state of zeros."""
        height, width = self.config.vision.image_size
        black = np.zeros((height, width, 3), np.uint8)
        parts = dict(self.robot.state)
        count = self.config.state_dim or self.processor.of_state.dims or 1
        for key in [key for key, dims in parts.items() if dims is None]:
            parts[key] = max(1, count - sum(dims or 1 for dims in parts.values()) + 1)
        return {
            **dict.fromkeys(self.robot.images.values(), black),
            **{key: np.zeros(dims) for key, dims in parts.items()},
            self.robot.prompt: "wait",
        }

    def _check_fits(self, robot: Robot) -> None:
        """A policy of another robot would move this one wrongly."""
        cameras, dims = self.config.cameras, self.processor.action_dim
        unknown = ", ".join(name for name in robot.images if name not in cameras)
        allowed = f"has cameras {unknown}; the policy has {', '.join(cameras)}"
        demand(not unknown, "robot", robot.name, allowed)
        allowed = f"takes {robot.action_dim} numbers an action; the policy makes {dims}"
        demand((robot.action_dim or 0) <= dims, "robot", robot.name, allowed)
        most, delta = robot.action_dim or dims, list(robot.delta)
        demand(len(delta) <= most, "robot.delta", delta, f"at most {most}, one an action")

    # -- lerobot's names -----------------------------------------------------------------------

    def select_action(
        self, batch: Mapping[str, Any], *, raw: bool = False, **params: Any
    ) -> np.ndarray:
        """The next action, `[batch, action_dim]`; new chunks are inferred when the last ones'
        `n_action_steps` rows are used up.

        Args:
            batch: one observation, or several; see `observation.split`.
            raw: in the model's normalised space, as lerobot's own method gives it, and not for
                the robot.
            **params: as for `infer`, of every observation; `noise` may be `[batch, horizon, 32]`.

        Raises:
            InvalidRequest: see `infer`; or real-time chunking is on, which this does not know.
        """
        allowed = "select_action knows no real-time chunking: use PolicyRunner, or "
        allowed += "predict_action_chunk"
        demand(not self.config.rtc["enabled"], "rtc_config", self.config.rtc_config, allowed)
        plain = params.get("prev_chunk_left_over") is None
        allowed = "is for predict_action_chunk, not select_action"
        demand(plain, "prev_chunk_left_over", "given", allowed)
        if not self._queue:
            chunks = self._infer_each(batch, raw, params)
            self._queue.extend(chunks.swapaxes(0, 1)[: self.config.n_action_steps])
        return self._queue.popleft()

    def predict_action_chunk(
        self,
        batch: Mapping[str, Any],
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: Any = None,
        execution_horizon: int | None = None,
        **params: Any,
    ) -> np.ndarray:
        """Chunks in the model's normalised space, `[batch, horizon, action_dim]`.

        Args:
            batch: one observation, or several; see `observation.split`.
            inference_delay: control steps until the chunk arrives.
            prev_chunk_left_over: what is left of the last ones, `[rows, action_dim]` or `[batch,
                rows, action_dim]`; None, or no rows, for plain sampling.
            execution_horizon: rows that it reaches; by default the checkpoint's.
            **params: as for `select_action`.
        """
        if prev_chunk_left_over is not None:
            params |= {
                "prev_chunk_left_over": prev_chunk_left_over,
                "inference_delay": 0 if inference_delay is None else inference_delay,
                "execution_horizon": execution_horizon,
            }
        return self._infer_each(batch, True, params)

    def _infer_each(
        self, batch: Mapping[str, Any], raw: bool, params: Mapping[str, Any]
    ) -> np.ndarray:
        """Chunks `[batch, horizon, action_dim]` of the observations of a batch."""
        robot = self.robot
        keys = (*robot.images.values(), *robot.state, robot.prompt)
        observations = split(batch, keys, robot.rename)
        count = len(observations)
        asked = [{**params, "raw": raw} for _ in observations]
        for name in ("noise", "prev_chunk_left_over") if count > 1 else ():
            given = self.engine.card.parameters[name].check(params.get(name))
            if given is not None and given.ndim == 3:
                allowed = f"must be {count}, as of images"
                demand(len(given) == count, name, f"{len(given)} rows", allowed)
                for own, row in zip(asked, given, strict=True):
                    own[name] = row
        pending: list[Pending] = []
        try:
            for observation, own in zip(observations, asked, strict=True):
                pending.append(self.begin(observation, **own))
            chunks = [each.result() for each in pending]
        finally:
            for each in pending:
                each.cancel()
        return np.stack([chunk.original if raw else chunk.actions for chunk in chunks])
