"""V-JEPA 2-AC as functions: latents stay on the device, to be used as often as one likes.

with Engine("vjepa2_ac") as engine:
    goal = engine.encode(goal_image)
    while True:
        image, pose = robot.observe()
        robot.move(engine.plan(image, goal, pose).actions[0])
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mstar.models.vjepa2.ac_flows import Found
from mstar.models.vjepa2.ac_inputs import check_frames, course, extrinsics_of, paired, rows, seen_of
from mstar.models.vjepa2.ac_requests import Asked, searching
from mstar.models.vjepa2.card_ac import PLANNING
from mstar.models.vjepa2.latents import Latents
from mstar.models.vjepa2.preprocess import squares
from mstar.models.vjepa2.requests import frames_of

__all__ = ["AcWorld", "Plan", "Rollout"]


@dataclass(frozen=True, eq=False)
class Rollout:
    """What comes of actions.

    Args:
        latents: `[horizon, patches, embed_dim]`, of several candidates `[samples, horizon, ...]`.
        states: before each action and, where they follow from the actions, after the last one:
            float32 `[horizon (+ 1), 7]`, or with candidates before that.
    """

    latents: Latents
    states: np.ndarray


@dataclass(frozen=True, eq=False)
class Plan:
    """Actions float32 `[horizon, 7]`, and how they were found.

    Args:
        costs: of the candidates of each iteration, float32 `[samples]`; of one that the budget cut
            short, of fewer.
        states: that the actions lead through, float32 `[horizon + 1, 7]`.
        latents: that they lead to, `[horizon, patches, embed_dim]`, if asked for.
        seconds: that the call took.
    """

    actions: np.ndarray
    costs: list[np.ndarray]
    states: np.ndarray
    latents: Latents | None
    seconds: float


class AcWorld:
    """`encode`, `predict`, `rollout` and `plan` of the Engine.

    Contexts and goals are frames (a video, an image, an array), or `Latents` of `encode`;
    `extrinsics`, of models trained with them, are `[frames and steps, 6]`. What does not fit raises
    InvalidRequest.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.config, self.world = engine.model.config, engine.model.world

    def encode(self, frames: Any, *, clip: bool = False, num_frames: int | None = None) -> Latents:
        """Latents `[frames, patches, embed_dim]`.

        Args:
            clip: of the frames as one clip, two a token and not normed, and not of each by itself.
            num_frames: so many frames, evenly spread; by default all, of files at most as many as
                in training.
        """
        count = self.engine.card.parameters.validate({"num_frames": num_frames})["num_frames"]
        usual = self.config.num_frames
        seen = frames_of("frames", frames, squares, num_frames=count, usual=usual)
        return Latents(self.engine.run(lambda _: self.world.see(seen, clip)))

    def predict(
        self, context: Any, actions: Any, states: Any, *, extrinsics: Any = None
    ) -> Latents:
        """What follows each frame of the context, `[frames, patches, embed_dim]`, not normed; of
        several candidates `[samples, frames, ...]`.

        Args:
            actions, states: `[frames, 7]`, or of candidates `[samples, frames, 7]`.
        """
        seen = seen_of("context", context, self.config)
        check_frames("context", f"{len(seen)} frames", len(seen), self.config)
        moves = paired(actions, states, len(seen))
        cameras = extrinsics_of(extrinsics, self.config, len(seen))

        async def walk(_: Any) -> Tensor:
            return await self.world.one_pass(await self.world.see(seen), *moves, cameras)

        return Latents(_like(actions, self.engine.run(walk)))

    def rollout(self, context: Any, actions: Any, state: Any, *, extrinsics: Any = None) -> Rollout:
        """What the camera will see after each action.

        Args:
            actions: `[steps, 7]`, or of candidates `[samples, steps, 7]`; of a context of several
                frames, first those between its frames.
            state: the pose, `[7]`, of each frame of the context; or of every step, too.
        """
        seen = seen_of("context", context, self.config)
        given, past = rows("actions", actions), len(seen) - 1
        horizon = max(1, given.shape[1] - past)
        check_frames("actions", given.shape[1], past + horizon, self.config)
        path = course(given, rows("state", state), len(seen), horizon)
        cameras = extrinsics_of(extrinsics, self.config, past + horizon)
        asked = Asked("rollout", seen, course=path, extrinsics=cameras)

        async def walk(_: Any) -> Tensor:
            start, _ = await self.world.begin(asked)
            return await self.world.imagine(start, path.actions, path.states)

        found = self.engine.run(walk)
        return Rollout(Latents(_like(actions, found)), _like(actions, path.states).numpy())

    def plan(
        self,
        context: Any,
        goal: Any,
        state: Any,
        *,
        actions: Any = None,
        extrinsics: Any = None,
        latents: bool = False,
        **settings: Any,
    ) -> Plan:
        """Search for the actions that make the camera see the goal, by the cross-entropy method.

        Args:
            goal: one frame.
            state: the pose, `[7]`; of each frame of the context.
            actions: between the frames of a context of several.
            latents: what the plan leads to, too; on top of the budget.
            **settings: of `Cem`, and `noise` `[iterations, horizon, samples, 4]`, `seed`, `cost`,
                and `budget_ms`, after which the best plan so far is taken.
        """
        began = time.monotonic()
        params = {**PLANNING.validate(settings), "actions": actions, "extrinsics": extrinsics}
        seen = seen_of("context", context, self.config)
        target = seen_of("goal", goal, self.config)
        asked = searching(seen, rows("state", state), target, params, self.config)

        async def walk(_: Any) -> tuple[Found, Tensor | None]:
            start, target = await self.world.begin(asked)
            found = await self.world.plan(asked, start, target, began)
            if not latents:
                return found, None
            return found, await self.world.imagine(start, found.actions[None], found.states)

        found, imagined = self.engine.run(walk)
        return Plan(
            found.actions.cpu().numpy(),
            [costs.cpu().numpy() for costs in found.costs],
            found.states[0].cpu().numpy(),
            None if imagined is None else Latents(imagined[0]),
            time.monotonic() - began,
        )


def _like(actions: Any, found: Tensor) -> Tensor:
    """`[samples, ...]`, or without that dimension if the actions had none."""
    return found if np.ndim(actions) == 3 or len(found) > 1 else found[0]
