"""Planning as a policy: observations and a goal in, actions out, for `PolicyRunner`.

policy = engine.policy({"goal": image, "samples": 100, "horizon": 2})
with PolicyRunner(policy, fps=4, deadline_ms=200) as runner:
    while True:
        runner.notify({"image": camera(), "state": pose()})
        if (action := runner.get_action()) is not None:
            move(action)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from mstar.errors import InvalidRequest
from mstar.models.control.pending import Pending
from mstar.models.parameters import demand, positive
from mstar.models.vjepa2.ac_flows import WorldModel
from mstar.models.vjepa2.ac_inputs import check_frames, rows
from mstar.models.vjepa2.ac_requests import Search, search_of
from mstar.models.vjepa2.latents import Latents

__all__ = ["PlanningPolicy"]

_SPARE = 0.1  # of a deadline, for seeing and for the way
_CALLED = {"video": "observation.image", "goal_image": "observation.goal"}


class PlanningPolicy:
    """Plans from every observation. Any thread may use it.

    Args:
        engine: that serves V-JEPA 2-AC.
        settings: of `Engine.plan`, and `goal`, unless observations have one.
        rename: key of an observation -> `image`, `state` or `goal`.

    """

    robot = SimpleNamespace(run=None)

    def __init__(
        self, engine: Any, settings: Mapping[str, Any], rename: Mapping[str, str] | None = None
    ) -> None:
        self.engine = engine
        self.settings = {name: value for name, value in settings.items() if name != "goal"}
        search = search_of(engine.card.parameters.validate({"plan": True, **self.settings}))
        horizon = search.cem.horizon
        check_frames("horizon", horizon, horizon, engine.model.config)
        # What a runner asks of a policy: of each plan the first action is executed.
        self.config = SimpleNamespace(
            chunk_size=horizon,
            n_action_steps=1,
            rtc_training_max_delay=0,
            rtc={"execution_horizon": 1},
        )
        fits = isinstance(rename, Mapping | None)
        demand(fits, "rename", rename, "must be a map from names to names")
        self._rename = dict(rename or {})
        self.engine.run(partial(_ready, engine.model.world, search))
        self._goal: Latents | None = None
        if settings.get("goal") is not None:
            self.aim(settings["goal"])

    def aim(self, goal: Any) -> None:
        """Take another goal; it is encoded once."""
        self._goal = goal if isinstance(goal, Latents) else self.engine.encode(goal)

    @property
    def metadata(self) -> dict[str, Any]:
        return {
            "model": self.engine.name,
            "action_horizon": self.config.chunk_size,
            "action_dim": 7,
            "observation": ["image", "state", "goal"],
            **self.settings,
        }

    def infer(
        self, obs: Mapping[str, Any], *, deadline_ms: float | None = None, **settings: Any
    ) -> dict[str, Any]:
        """`{"actions": float32 [horizon, 7], "policy_timing": {"infer_ms": ...}}`.

        Args:
            obs: `image`, `state` `[7]`, and `goal` if it is to be another one this time.
            deadline_ms: milliseconds until the result must be there: what is found by then.
            **settings: instead of the policy's.

        Raises:
            InvalidRequest: the observation lacks something, or a setting is wrong.
            DeadlineExceeded: not even the observation was seen in time.
        """
        chunk = self.begin(obs, deadline_ms=deadline_ms, **settings).result()
        return {"actions": chunk.actions, "policy_timing": {"infer_ms": chunk.infer_ms}}

    def begin(
        self, obs: Mapping[str, Any], *, deadline_ms: float | None = None, **settings: Any
    ) -> Pending:
        """Queue an observation; `infer` in two parts."""
        began = time.monotonic()
        given = {self._rename.get(key, key): value for key, value in obs.items()}
        for name in ("image", "state"):
            there = given.get(name) is not None
            demand(there, f"observation.{name}", None, "must be given")
        goal = given.get("goal")
        goal = self._goal if goal is None else goal
        demand(goal is not None, "observation.goal", None, "there is no goal: see `aim`")
        encoded = isinstance(goal, Latents)
        if deadline_ms is not None:
            deadline_ms = positive("deadline_ms", deadline_ms, 1e9)
            settings = {"budget_ms": deadline_ms * (1 - _SPARE), **settings}
        state = rows("observation.state", given["state"])[0, -1].numpy()
        try:
            handle = self.engine.submit(
                video=given["image"],
                states=state,
                plan=True,
                output_modalities=("action",),
                stream=False,
                **{"goal_hidden" if encoded else "goal_image": goal, **self.settings, **settings},
            )
        except InvalidRequest as error:
            field = _CALLED.get(error.field, error.field)
            raise InvalidRequest(field, error.value, error.allowed) from None
        return Pending(lambda actions, _: actions, handle, state, deadline_ms, began)

    def reset(self) -> None:
        """A new episode begins; the goal stays."""


async def _ready(world: WorldModel, search: Search, _: Any) -> None:
    """Capture what plans would have to wait for."""
    for call in world.shapes(search):
        await world.whole(call)
