"""One step of the flow for all requests that are at one: guidance, Euler, the next inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.engine.kernels.guided_euler import guided_euler
from mstar.engine.kernels.staging import to_device
from mstar.models.bagel.guidance import Guidance, guidance_table
from mstar.models.bagel.networks import Bagel

__all__ = ["UNGUIDED", "FlowCall", "flow_runner"]

UNGUIDED = Guidance()


@dataclass(eq=False)
class FlowCall:
    """The end of one step and the beginning of the next.

    Args:
        grid: latent tokens down and across.
        latents: x at the step's timestep, float32 `[tokens, latent_dim]`.
        next_t: the timestep that follows.
        dt: how far it is from this step's.
        hidden: what the last layer puts out in the branches `main`, `text`, `image`, each
            `[tokens, hidden]`; `None` where a branch is not needed. Empty before the first step.
        guidance: how the branches are mixed.
    """

    grid: tuple[int, int]
    latents: Tensor
    next_t: float
    dt: float = 0.0
    hidden: tuple[Tensor | None, ...] = ()
    guidance: Guidance = UNGUIDED


def flow_runner(
    bagel: Bagel, marks: Tensor
) -> Callable[[list[FlowCall]], list[tuple[Tensor, Tensor]]]:
    """What the node runs: calls of one grid -> their latents at `next_t`, and the inputs
    `[tokens + 2, hidden]` of the decoder there.

    Args:
        marks: embeddings of the start and the end of an image, `[2, hidden]`.
    """

    def run(calls: list[FlowCall]) -> list[tuple[Tensor, Tensor]]:
        latents = torch.stack([call.latents for call in calls])
        moving = [index for index, call in enumerate(calls) if call.hidden]
        if moving:
            moved = _euler(bagel, latents, [calls[i] for i in moving], moving)
            latents = (
                moved
                if len(moving) == len(calls)
                else latents.index_copy(0, to_device(moving, torch.int64, latents.device), moved)
            )
        t = to_device([call.next_t for call in calls], torch.float32, latents.device)
        tokens = bagel.latent_tokens(latents, t, *calls[0].grid)
        ends = marks.expand(len(calls), -1, -1)
        return list(zip(latents, torch.cat([tokens, ends], 1), strict=True))

    return run


def _euler(
    bagel: Bagel,
    latents: Tensor,
    calls: Sequence[FlowCall],
    rows: Sequence[int],
) -> Tensor:
    """x - v * dt of the calls, whose latents are the given rows."""
    states: list[Tensor] = []
    places: list[list[int]] = [[], [], []]  # of each call's branches, in `states`
    for call in calls:
        main = len(states)
        for branch, hidden in enumerate(call.hidden):
            places[branch].append(main if hidden is None else len(states))
            if hidden is not None:
                states.append(hidden)
    velocities = bagel.velocity(torch.stack(states))
    numbers = [place for branch in places for place in branch]
    device = latents.device
    table = guidance_table([call.guidance for call in calls], [call.dt for call in calls], device)
    start = latents if len(rows) == len(latents) else latents[to_device(rows, torch.int64, device)]
    return guided_euler(
        start, velocities, to_device(numbers, torch.int32, device).view(3, -1), table
    )
