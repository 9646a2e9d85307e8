"""Rollouts: what a camera will show, action by action, from the frames that it has seen.

A frame's keys and values are kept; those of the frames before the last one that was seen are
computed once, and shared by all samples.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mstar.models.vjepa2.ac_cache import FrameCache
from mstar.models.vjepa2.ac_predictor import AcPredictor, Frames

__all__ = ["Finish", "Start", "Step", "at_once", "roll", "run_through"]

Finish = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """One pass of the predictor, and what makes what is wanted of the hidden states `[samples,
    frames, patches, width]`."""

    frames: Frames
    finish: Finish


@dataclass(frozen=True, eq=False)
class Start:
    """What rollouts begin with.

    Args:
        latents: of the last frame that was seen, `[1, patches, embed_dim]`.
        together: whether all samples are in the same state: what follows from it is computed once.
        extrinsics: of this frame and those to come, float32 `[horizon, 6]`, or None.
        context: the frames before.
    """

    latents: Tensor
    together: bool = False
    extrinsics: Tensor | None = None
    context: FrameCache | None = None

    def cached(self, horizon: int) -> int:
        """Frames of each sample that are to be kept."""
        return 0 if self.context is None and horizon == 1 else horizon


async def roll(
    predict: Callable[[Step], Awaitable[Tensor]],
    predictor: AcPredictor,
    start: Start,
    actions: Tensor,
    states: Tensor,
    *,
    last: Finish | None = None,
    each: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Latents `[samples, horizon, patches, embed_dim]` after each action, normed; or what `last`
    makes of the last one's hidden states.

    Args:
        predict: runs a step.
        actions: float32 `[samples, horizon, 7]`, from the last frame that was seen.
        states: before each action, float32 `[samples, horizon or more, 7]`.
        each: is given the latents `[samples, patches, embed_dim]` of every step.
    """
    samples, horizon, _ = actions.shape
    kept = start.cached(horizon)
    cache = predictor.cache(samples, kept, start.context) if kept else None
    latents, found = start.latents[None], []
    for step in range(horizon):
        now = slice(step, step + 1)
        frames = Frames(
            latents,
            actions[:, now],
            states[:1, now] if start.together and not step else states[:, now],
            None if start.extrinsics is None else start.extrinsics[None, now],
            cache,
        )
        if last is not None and step == horizon - 1:
            return await predict(Step(frames, last))
        latents = await predict(Step(frames, predictor.normed))
        if last is None:
            found.append(latents)
        if each is not None:
            each(latents[:, 0])
    return torch.cat(found, 1)


def at_once(predictor: AcPredictor) -> Callable[[Step], Awaitable[Tensor]]:
    """Runs steps without waiting for anything; see `run_through`."""

    async def predict(step: Step) -> Tensor:
        return step.finish(predictor([step.frames])[0])

    return predict


def run_through(coroutine: Coroutine[Any, Any, Tensor]) -> Tensor:
    """What a coroutine that waits for nothing returns."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("it waits")
