"""What V-JEPA 2-AC can do, as coroutines above its nodes: see, predict, imagine, score, plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.engine.traps import gather
from mstar.models.vjepa2.ac_nodes import AcNodes, Seeing, Whole
from mstar.models.vjepa2.ac_predictor import Frames
from mstar.models.vjepa2.ac_requests import Asked, Search
from mstar.models.vjepa2.cem import SEARCHED, Budget
from mstar.models.vjepa2.poses import trajectory
from mstar.models.vjepa2.rollout import Finish, Start, Step, roll

__all__ = ["Found", "WorldModel"]


@dataclass(frozen=True, eq=False)
class Found:
    """What a search came to: actions float32 `[horizon, 7]`, costs `[samples]` of the candidates of
    each iteration (fewer if it was cut short), and states that the actions lead through, float32
    `[1, horizon + 1, 7]`."""

    actions: Tensor
    costs: list[Tensor]
    states: Tensor


class WorldModel(AcNodes):
    """The flows through the nodes.

    Frames are uint8 `[frames, 3, side, side]`. Latents are `[frames, patches, embed_dim]`, on the
    device. Where a flow sees something, it may be either.
    """

    async def see(self, seen: Tensor, clip: bool = False) -> Tensor:
        """The latents of frames; latents as they are, but in the run dtype, so that what was
        captured for either serves both."""
        if seen.dtype == torch.uint8:
            return await self.encode(Seeing(seen, clip))
        return seen.to(self.device, self.predictor.predictor_norm.weight.dtype)

    async def one_pass(
        self,
        latents: Tensor,
        actions: Tensor,
        states: Tensor,
        extrinsics: Tensor | None = None,
        finish: Finish | None = None,
    ) -> Tensor:
        """What follows each of the frames, for several candidates: latents `[samples, frames,
        patches, embed_dim]`, not normed, or what `finish` makes of hidden states.

        Args:
            actions, states: float32 `[samples, frames, 7]`.
            extrinsics: float32 `[frames, 6]`.
        """
        if extrinsics is not None:
            extrinsics = self.here(extrinsics)[None]
        actions, states, found = self.here(actions), self.here(states), []
        for part in self._parts(len(actions), actions.shape[1], 0):
            frames = Frames(latents[None], actions[part], states[part], extrinsics)
            found.append(await self.predict(Step(frames, finish or self.predictor.latents)))
        return torch.cat(found)

    async def begin(self, asked: Asked) -> tuple[Start, Tensor | None]:
        """Where rollouts start, for `imagine`, `score` and `plan`, and the goal `[patches,
        embed_dim]`, if there is one."""
        path, seen = asked.course, [asked.seen, *([] if asked.goal is None else [asked.goal])]
        latents, *goals = await gather(*map(self.see, seen))
        cameras = None if asked.extrinsics is None else self.here(asked.extrinsics)
        past, context = len(latents) - 1, None
        if past:
            moves = (self.here(each)[None] for each in (path.past_actions, path.past_states))
            seen_from = None if cameras is None else cameras[None, :past]
            context = self.predictor.cache(1, past)
            known = Frames(latents[None, :past], *moves, seen_from, context)
            await self.predict(Step(known, lambda hidden: hidden[:, :0]))
        ahead = None if cameras is None else cameras[past:]
        start = Start(latents[past:], path.together, ahead, context)
        return start, goals[0][-1] if goals else None

    async def imagine(
        self,
        start: Start,
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
        parts = list(self._parts(len(actions), 1, start.cached(actions.shape[1])))
        tell = each if len(parts) == 1 else None
        found = []
        for part in parts:
            given = self.here(actions[part]), self.here(states[part])
            if tell is None and self.captured is not None:
                found.append(await self.whole(Whole(start, *given)))
            else:
                found.append(await roll(self.predict, self.predictor, start, *given, each=tell))
        whole = torch.cat(found)
        for latents in whole.unbind(1) if each is not None and tell is None else ():
            each(latents)
        return whole

    async def score(
        self,
        start: Start,
        actions: Tensor,
        states: Tensor,
        goal: Tensor,
        kind: str = "l1",
        clock: Budget | None = None,
    ) -> Tensor:
        """How far from the goal `[patches, embed_dim]` the actions lead, float32 `[samples]`; of
        the first samples only, if the clock says so. See `imagine` and `cost`."""
        size = self.size(1, start.cached(actions.shape[1]))
        found, done = [], 0
        while done < len(actions):
            count = min(size, len(actions) - done)
            if clock is not None and (count := clock.fits(count)) and self.captured is not None:
                count = 1 << (count.bit_length() - 1)  # so that there are few shapes
            if not count:
                break
            part = slice(done, done + count)
            given = self.here(actions[part]), self.here(states[part])
            if self.captured is not None:
                found.append(await self.whole(Whole(start, *given, goal, kind)))
            else:
                last = self.cost(goal, kind)
                found.append(await roll(self.predict, self.predictor, start, *given, last=last))
            done += count
            if clock is not None:
                clock.took(count, self.device)
        return torch.cat(found) if found else torch.empty(0, device=self.device)

    async def plan(self, asked: Asked, start: Start, goal: Tensor, began: float) -> Found:
        """Search for the actions that lead to the goal, with a budget since `time.monotonic` was
        `began`."""
        search, cem = asked.search, asked.search.cem
        clock = None if search.budget is None else Budget(began + search.budget, cem.topk)
        mean, std = cem.start(self.device)
        state, costs = self.here(asked.course.states[:, 0]), []
        for noise in self._noise(search):
            actions = cem.candidates(mean, std, noise)
            states = trajectory(state, actions[:, :-1])
            scored = await self.score(start, actions, states, goal, search.cost, clock)
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

    def _parts(self, samples: int, frames: int, cached: int) -> Iterator[slice]:
        size = self.size(frames, cached)
        return (slice(first, first + size) for first in range(0, samples, size))
