"""V-JEPA 2-AC: frames are encoded, and what comes after a robot's actions is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.models.base import Inputs, Model, Setup
from mstar.models.parameters import demand
from mstar.models.vjepa2.ac_flows import WorldModel
from mstar.models.vjepa2.ac_nodes import Seeing
from mstar.models.vjepa2.ac_requests import Asked, Search, lay_out
from mstar.models.vjepa2.cem import cost
from mstar.models.vjepa2.latents import give
from mstar.models.vjepa2.networks import BLOCKS, AcNetworks, load_ac_networks
from mstar.models.vjepa2.rollout import Start

__all__ = ["VJepa2Ac"]


class VJepa2Ac(Model):
    """Nodes `encode`, `predict` and `imagine`; see `AcNodes`."""

    quantized = BLOCKS

    def __init__(self, networks: AcNetworks) -> None:
        self.networks = (networks,)
        self.config = networks.config
        self.world = WorldModel(networks)

    @classmethod
    def load(cls, setup: Setup) -> VJepa2Ac:
        return cls(load_ac_networks(setup.folders["vjepa2_ac"], **setup.filling))

    @property
    def nodes(self) -> Sequence[Node]:
        return self.world.encode, self.world.predict, self.world.whole

    def prepare(self, inputs: Inputs, params: dict[str, Any], outputs: tuple[str, ...]) -> Asked:
        return lay_out(inputs, params, outputs, self.config)

    async def walk(self, request: Request) -> str:
        asked: Asked = request.inputs
        if asked.flow == "encode":
            seen = await self.world.see(asked.seen, asked.clip)
            give(request, seen.flatten(0, 1)[None])
        elif asked.flow == "pass":
            await self._pass(request, asked)
        else:
            flow = getattr(self, f"_{asked.flow}")
            await flow(request, asked, *await self.world.begin(asked))
        return "stop"

    async def _pass(self, request: Request, asked: Asked) -> None:
        """One prediction after each frame, or the costs of candidates over all of them."""
        world, params = self.world, request.params
        latents = await world.see(asked.seen, asked.clip)
        if asked.goal is None:
            found = await world.one_pass(latents, *asked.moves, asked.extrinsics)
            give(request, found.flatten(1, 2), name="predicted")
            return
        goal = (await world.see(asked.goal, asked.clip)).flatten(0, 1)  # one frame is the last
        eps = None if asked.clip else self.config.reps_layer_norm_eps

        def far(predicted: Tensor) -> Tensor:
            return cost(predicted.flatten(1, 2)[:, -len(goal) :], goal, params["cost"], eps)

        def scored(hidden: Tensor) -> Tensor:
            return far(world.predictor.latents(hidden))

        alone = params["return_latents"] is False
        found = await world.one_pass(
            latents, *asked.moves, asked.extrinsics, scored if alone else None
        )
        costs, predicted = (found, None) if alone else (far(found), found.flatten(1, 2))
        self._choose(request, asked.moves[0], costs, predicted)

    async def _rollout(self, request: Request, asked: Asked, start: Start, goal: None) -> None:
        path, step = asked.course, count(1)

        def each(latents: Tensor) -> None:
            give(request, latents, name="predicted", step=next(step))

        tell = each if request.params["stream_rollout"] else None
        found = await self.world.imagine(start, path.actions, path.states, tell)
        for latents in found.unbind(1) if tell is None else ():
            each(latents)

    async def _score(self, request: Request, asked: Asked, start: Start, goal: Tensor) -> None:
        path, params = asked.course, request.params
        given, found = (start, path.actions, path.states), None
        if params["return_latents"] is not False:
            found = (await self.world.imagine(*given))[:, -1]
            costs = cost(found, goal, params["cost"], None)
        else:
            costs = await self.world.score(*given, goal, params["cost"])
        self._choose(request, path.actions, costs, found)

    async def _energy(self, request: Request, asked: Asked, start: Start, goal: Tensor) -> None:
        path, params = asked.course, request.params
        costs = await self.world.score(start, path.actions, path.states, goal, params["cost"])
        grid = costs.unflatten(0, (params["energy"], -1))
        give(request, grid, name="energy", axes=params["energy_axes"], span=params["energy_span"])

    async def _plan(self, request: Request, asked: Asked, start: Start, goal: Tensor) -> None:
        found = await self.world.plan(asked, start, goal, request.submitted)
        actions = found.actions.cpu().numpy()
        form = {"dtype": "float32", "shape": list(actions.shape)}
        request.emit_actions(actions, iterations=len(found.costs), **form)
        if "latent" in request.output_modalities:
            for iteration, costs in enumerate(found.costs):
                give(request, costs, name="costs", iteration=iteration)
            if request.params["return_latents"]:
                planned = found.actions.unsqueeze(0)
                latents = await self.world.imagine(start, planned, found.states)
                give(request, latents, name="predicted")

    def _choose(
        self, request: Request, actions: Tensor, costs: Tensor, found: Tensor | None
    ) -> None:
        """Give the costs of candidates, the best of them, and what they lead to."""
        best = int(costs.argmin())
        if "latent" in request.output_modalities:
            give(request, costs, name="costs", best_index=best)
            if found is not None:
                give(request, found, name="predicted")
        if "action" in request.output_modalities:
            request.emit_actions(actions[best].cpu().numpy(), best_index=best)

    def warmup(self) -> None:
        """See `Model.warmup`: one frame is seen, and two. Plans with the usual settings are
        captured; others when they are first asked for, or when their policy is made."""
        frame = torch.zeros(1, 3, *self.config.img_size, dtype=torch.uint8)
        for batch in (1, 2):
            self.world.encode.run([Seeing(frame, False)] * batch)
        for call in self.world.shapes(Search()):
            self.world.whole.run([call])

    def world_of(self, engine: Any) -> Any:
        from mstar.models.vjepa2.ac_world import AcWorld

        return AcWorld(engine)

    def policy_of(self, engine: Any, robot: Any, rename: Mapping[str, str] | None) -> Any:
        """See `Model.policy_of`; `robot` is the settings of a `PlanningPolicy`."""
        from mstar.models.vjepa2.ac_policy import PlanningPolicy

        if robot is None:  # a server asks, to show a policy that needs no more than observations
            raise NotImplementedError("a plan needs settings: engine.policy({'goal': image, ...})")
        allowed = "must be settings of engine.plan: {'goal': image, 'samples': 100, ...}"
        demand(isinstance(robot, Mapping), "robot", robot, allowed)
        return PlanningPolicy(engine, robot, rename)
