"""Rollouts: what a camera will show, action by action, from the frames that it has seen.

A frame's keys and values are kept; those of the frames before the last one of the context are
computed once for all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from torch import Tensor

from mstar.models.vjepa2.ac_cache import FrameCache
from mstar.models.vjepa2.ac_predictor import AcPredictor, Frames

__all__ = ["Finish", "Rollouts", "Start", "Step", "run_through"]

Finish = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """One pass of the predictor.

    Args:
        finish: makes what is wanted of the hidden states `[samples, frames, patches, width]`.
    """

    frames: Frames
    finish: Finish


@dataclass(frozen=True, eq=False)
class Start:
    """What rollouts begin with.

    Args:
        latents: of the frames that were seen, `[frames, patches, embed_dim]`.
        actions, states: of the frames but for the last one, float32 `[frames - 1, 7]`.
        extrinsics: of all frames to come, too, float32 `[frames - 1 + horizon, 6]`, or None.
        together: whether all samples are in the same state: what follows from it is computed once.
    """

    latents: Tensor
    actions: Tensor
    states: Tensor
    extrinsics: Tensor | None = None
    together: bool = False

    @property
    def past(self) -> int:
        """Frames before the last one."""
        return len(self.latents) - 1


class Rollouts:
    """Rollouts of any number of samples from one start.

    `prefix` and `roll` are generators: they yield steps, and are sent what each came to.
    """

    def __init__(self, predictor: AcPredictor, start: Start) -> None:
        self.predictor, self.start = predictor, start
        self._prefix: FrameCache | None = None

    def prefix(self) -> Generator[Step, Tensor, None]:
        """Keys and values of the frames before the last one."""
        start, past = self.start, self.start.past
        if past:
            cache = self.predictor.cache(1, past)
            seen = start.latents[None, :past]
            known = Frames(
                seen, start.actions[None], start.states[None], self._extrinsics(0, past), cache
            )
            yield Step(known, lambda hidden: hidden[:, :0])
            self._prefix = cache

    def roll(
        self, actions: Tensor, states: Tensor, last: Finish | None = None
    ) -> Generator[Step, Tensor, Tensor]:
        """The latents `[samples, 1, patches, embed_dim]` after the last action, normed, or what
        `last` makes of its hidden states.

        Args:
            actions: float32 `[samples, horizon, 7]`, from the last frame that was seen.
            states: before each action, float32 `[samples, horizon or more, 7]`.
        """
        samples, horizon, _ = actions.shape
        past = self.start.past
        cache = None
        if past + horizon > 1:
            cache = self.predictor.cache(samples, past + horizon)
            if self._prefix is not None:
                cache.begin_with(self._prefix)
        latents = self.start.latents[None, past:]
        for step in range(horizon):
            span = slice(step, step + 1)
            frames = Frames(
                latents,
                actions[:, span],
                states[:1, span] if self.start.together and not step else states[:, span],
                self._extrinsics(past + step, past + step + 1),
                cache,
            )
            finish = last if last is not None and step == horizon - 1 else self.normed
            latents = yield Step(frames, finish)
        return latents

    def normed(self, hidden: Tensor) -> Tensor:
        """Latents as they are used again, of hidden states."""
        return self.predictor.norm(self.predictor.latents(hidden))

    def _extrinsics(self, begin: int, end: int) -> Tensor | None:
        given = self.start.extrinsics
        return None if given is None else given[None, begin:end]


def run_through(
    predictor: AcPredictor,
    steps: Generator[Step, Tensor, Tensor],
    each: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Run steps one after the other; what they return.

    Args:
        each: is given what each step comes to.
    """
    try:
        step = next(steps)
        while True:
            found = step.finish(predictor([step.frames])[0])
            if each is not None:
                each(found)
            step = steps.send(found)
    except StopIteration as end:
        return end.value
