"""What V-JEPA 2-AC can do, as coroutines above its nodes: see, predict, imagine, score, plan."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.engine.traps import gather
from mstar.models.vjepa2.ac_nodes import AcNodes, Seeing, Whole
from mstar.models.vjepa2.ac_predictor import Frames
from mstar.models.vjepa2.ac_requests import Asked, Search
from mstar.models.vjepa2.cem import SEARCHED, Budget
from mstar.models.vjepa2.poses import trajectory
from mstar.models.vjepa2.rollout import Finish, Rollouts, Start, Step

__all__ = ["Found", "WorldModel"]


@dataclass(frozen=True, eq=False)
class Found:
    """What a search came to.

    Args:
        actions: float32 `[horizon, 7]`.
        costs: of the candidates of each iteration, `[samples]`; a last one that was cut short has
            fewer.
        states: that the actions lead through, float32 `[1, horizon + 1, 7]`.
    """

    actions: Tensor
    costs: list[Tensor]
    states: Tensor


class WorldModel(AcNodes):
    """The flows through the nodes.

    Frames are uint8 `[frames, 3, side, side]`. Latents are `[frames, patches, embed_dim]`, on the
    device. Where a flow sees something, it may be either.
    """

    async def see(self, seen: Tensor, clip: bool = False) -> Tensor:
        """The latents of frames; latents as they are."""
        if seen.dtype == torch.uint8:
            return await self.encode(Seeing(seen, clip))
        return seen.to(self.device)

    async def one_pass(
        self,
        latents: Tensor,
        actions: Tensor,
        states: Tensor,
        extrinsics: Tensor | None = None,
        finish: Finish | None = None,
    ) -> Tensor:
        """What follows each of the frames, for several candidates: latents `[samples, frames,
        patches, embed_dim]`, not normed.

        Args:
            actions, states: float32 `[samples, frames, 7]`.
            extrinsics: float32 `[frames, 6]`.
            finish: makes something else of hidden states.
        """
        if extrinsics is not None:
            extrinsics = self.here(extrinsics)[None]
        actions, states, found = self.here(actions), self.here(states), []
        for part in self._parts(len(actions), actions.shape[1], 0):
            frames = Frames(latents[None], actions[part], states[part], extrinsics)
            found.append(await self.predict(Step(frames, finish or self.predictor.latents)))
        return torch.cat(found)

    async def begin(self, asked: Asked) -> tuple[Rollouts, Tensor | None]:
        """Rollouts from what is seen, for `imagine`, `score` and `plan`, and the goal `[patches,
        embed_dim]`, if there is one."""
        path, seen = asked.course, [asked.seen, *([] if asked.goal is None else [asked.goal])]
        latents, *goals = await gather(*map(self.see, seen))
        given = (path.past_actions, path.past_states, asked.extrinsics)
        known = (None if each is None else self.here(each) for each in given)
        rollouts = Rollouts(self.predictor, Start(latents, *known, path.together))
        await self._walk(rollouts.prefix())
        return rollouts, goals[0][-1] if goals else None

    async def imagine(
        self,
        rollouts: Rollouts,
        actions: Tensor,
        states: Tensor,
        each: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Latents `[samples, horizon, patches, embed_dim]` after each action, normed.

        Args:
            actions: float32 `[samples, horizon, 7]`.
            states: before each action, float32 `[samples, horizon or more, 7]`.
            each: is given the latents `[samples, patches, embed_dim]` of every step as soon as
                they are there, if all samples fit into one batch.
        """
        parts = list(self._parts(len(actions), 1, rollouts.start.past + actions.shape[1]))
        tell = each if len(parts) == 1 else None
        found = []
        for part in parts:
            if tell is None and self._capturing(rollouts):
                given = self.here(actions[part]), self.here(states[part])
                found.append(await self.whole(Whole(rollouts.start, *given)))
                continue
            steps: list[Tensor] = []

            def keep(latents: Tensor, steps: list[Tensor] = steps) -> None:
                steps.append(latents[:, 0])
                if tell is not None:
                    tell(steps[-1])

            todo = rollouts.roll(self.here(actions[part]), self.here(states[part]))
            await self._walk(todo, keep)
            found.append(torch.stack(steps, 1))
        whole = torch.cat(found)
        if each is not None and tell is None:
            for latents in whole.unbind(1):
                each(latents)
        return whole

    async def score(
        self,
        rollouts: Rollouts,
        actions: Tensor,
        states: Tensor,
        goal: Tensor,
        kind: str = "l1",
        clock: Budget | None = None,
    ) -> Tensor:
        """How far from the goal the actions lead, float32 `[samples]`; of the first samples only,
        if the clock says so.

        Args:
            actions, states: see `imagine`.
            goal: `[patches, embed_dim]`.
            kind: see `cost`.
        """
        size = self.size(1, rollouts.start.past + actions.shape[1])
        found, done = [], 0
        while done < len(actions):
            count = min(size, len(actions) - done)
            if clock is not None and (count := clock.fits(count)) and self._capturing(rollouts):
                count = 1 << (count.bit_length() - 1)  # so that there are few shapes
            if not count:
                break
            part = slice(done, done + count)
            given = self.here(actions[part]), self.here(states[part])
            if self._capturing(rollouts):
                call = Whole(rollouts.start, *given, goal, kind)
                found.append(await self.whole(call))
            else:
                steps = rollouts.roll(*given, self.cost(goal, kind))
                found.append(await self._walk(steps))
            done += count
            if clock is not None:
                clock.took(count, self.device)
        return torch.cat(found) if found else torch.empty(0, device=self.device)

    async def plan(self, asked: Asked, rollouts: Rollouts, goal: Tensor, began: float) -> Found:
        """Search for the actions that lead to the goal.

        Args:
            rollouts, goal: of `begin`.
            began: when the budget began, of `time.monotonic`.
        """
        search, cem = asked.search, asked.search.cem
        clock = None if search.budget is None else Budget(began + search.budget, cem.topk)
        mean, std = cem.start(self.device)
        state, costs = self.here(asked.course.states[:, 0]), []
        for noise in self._noise(search):
            actions = cem.candidates(mean, std, noise)
            states = trajectory(state, actions[:, :-1])
            scored = await self.score(rollouts, actions, states, goal, search.cost, clock)
            if places := cem.places(len(scored), first=not costs):
                mean, std = cem.update(mean, std, actions[: len(scored)], scored, places)
                costs.append(scored)
            if len(scored) < cem.samples:
                break
        actions = cem.plan(mean)
        return Found(actions, costs, trajectory(state, actions.unsqueeze(0)))

    def _noise(self, search: Search) -> Iterator[Tensor]:
        """Normal noise for every iteration; that of a seed is drawn on the device."""
        if search.noise is not None:
            yield from map(self.here, search.noise)
            return
        cem, generator = search.cem, torch.Generator(self.device).manual_seed(search.seed)
        for _ in range(cem.iterations):
            shape = cem.horizon, cem.samples, SEARCHED
            yield torch.randn(shape, generator=generator, device=self.device)

    # -- how -----------------------------------------------------------------------------------

    async def _walk(
        self, steps: Generator[Step, Tensor, Tensor], each: Callable[[Tensor], None] | None = None
    ) -> Tensor | None:
        """Run steps; what they return."""
        try:
            step = next(steps)
            while True:
                found = await self.predict(step)
                if each is not None:
                    each(found)
                step = steps.send(found)
        except StopIteration as end:
            return end.value

    def _capturing(self, rollouts: Rollouts) -> bool:
        start = rollouts.start
        return self.captured is not None and not start.past and start.extrinsics is None

    def _parts(self, samples: int, frames: int, cached: int) -> Iterator[slice]:
        size = self.size(frames, cached)
        return (slice(first, first + size) for first in range(0, samples, size))
