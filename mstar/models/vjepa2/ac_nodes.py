"""The nodes of V-JEPA 2-AC: what is batched, and on a GPU captured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.engine.captured import CapturedSteps, record
from mstar.engine.node import Node
from mstar.models.vjepa2.ac_networks import AcNetworks
from mstar.models.vjepa2.cem import cost
from mstar.models.vjepa2.rollout import Finish, Rollouts, Start, Step, run_through

__all__ = ["AcNodes", "Seeing", "Whole"]

_FEW_FRAMES = 16  # whose encoding is worth a captured step
_ROOM = {"cpu": 1 << 28, "cuda": 1 << 32}  # bytes of one batch: activations, and cached frames


@dataclass(frozen=True, eq=False)
class Seeing:
    """Frames uint8 `[frames, 3, side, side]`, each by itself or as one clip."""

    frames: Tensor
    clip: bool


@dataclass(frozen=True, eq=False)
class Whole:
    """A rollout in one piece, or the costs at its end if there is a goal; see `Rollouts.roll`."""

    start: Start
    actions: Tensor
    states: Tensor
    goal: Tensor | None = None
    kind: str = ""


class AcNodes:
    """Nodes `encode`, `predict` and `imagine`.

    Rollouts are steps of `predict`, so others take turns with them, but where steps are captured:
    then they are one step of `imagine`, all of it.
    """

    def __init__(self, networks: AcNetworks, captured: CapturedSteps | None = None) -> None:
        self.networks, self.predictor = networks, networks.predictor
        self.config, self.device = networks.config, networks.device
        self.encode = Node("encode", self._encode, key=_alike, cost=_frames, max_cost=64)
        if captured is None and self.device.type == "cuda":
            captured = CapturedSteps(record(), self.device)
        self.captured = captured
        self.whole = Node("imagine", self._imagine, max_batch=1)
        most = self.size(1, 0)
        self.predict = Node("predict", self._predict, key=_same_place, cost=_samples, max_cost=most)

    @torch.inference_mode()
    def _encode(self, batch: list[Seeing]) -> list[Tensor]:
        frames = [call.frames.to(self.device) for call in batch]
        if batch[0].clip:
            return [self.networks.encode_clip(each) for each in frames]
        together = torch.cat(frames)
        if self.captured is None or len(together) > _FEW_FRAMES:
            found = self.networks.encode_frames(together)
        else:
            (found,) = self.captured.run(self._see, together, key="encode")
            found = found.clone()
        return list(found.split([len(each) for each in frames]))

    @torch.inference_mode()
    def _predict(self, batch: list[Step]) -> list[Tensor]:
        hidden = self.predictor([call.frames for call in batch])
        return [call.finish(each) for call, each in zip(batch, hidden, strict=True)]

    def _see(self, frames: Tensor) -> tuple[Tensor]:
        return (self.networks.encode_frames(frames),)

    @torch.inference_mode()
    def _imagine(self, batch: list[Whole]) -> list[Tensor]:
        found = []
        for call in batch:
            together, kind = call.start.together, call.kind

            def step(
                latents: Tensor,
                actions: Tensor,
                states: Tensor,
                goal: Tensor | None = None,
                together: bool = together,
                kind: str = kind,
            ) -> tuple[Tensor]:
                none = actions[0, :0]
                rollouts = Rollouts(self.predictor, Start(latents, none, none, None, together))
                if goal is not None:
                    steps = rollouts.roll(actions, states, self.cost(goal, kind))
                    return (run_through(self.predictor, steps),)
                kept: list[Tensor] = []
                run_through(self.predictor, rollouts.roll(actions, states), kept.append)
                return (torch.cat(kept, 1),)

            given = [call.start.latents, call.actions, call.states]
            given += [] if call.goal is None else [call.goal]
            (made,) = self.captured.run(step, *given, key=("imagine", together, kind))
            found.append(made.clone())
        return found

    def cost(self, goal: Tensor, kind: str) -> Finish:
        """What the last step of a rollout makes of its hidden states, to score it."""
        predictor, eps = self.predictor, self.config.reps_layer_norm_eps
        return lambda hidden: cost(predictor.latents(hidden)[:, 0], goal, kind, eps)

    def here(self, tensor: Tensor) -> Tensor:
        """A tensor as float32 on the device."""
        return tensor.to(self.device, torch.float32)

    def size(self, frames: int, cached: int) -> int:
        """Samples in a batch: of so many frames at a time, with a cache for so many."""
        sizes, item = self.config.predictor, self.predictor.predictor_norm.weight.itemsize
        kept = 2 * self.config.pred_depth * sizes.width * cached if cached > 1 else 0
        each = (kept + 2 * frames * (sizes.hidden + sizes.width)) * self.predictor.frame_tokens
        return max(1, _ROOM[self.device.type] // (each * item))


def _frames(call: Seeing) -> int:
    return len(call.frames)


def _alike(call: Seeing) -> tuple[bool, torch.Size]:
    return call.clip, call.frames.shape[-2:]


def _samples(step: Step) -> int:
    return step.frames.samples * step.frames.count


def _same_place(step: Step) -> tuple[int, int]:
    return step.frames.first, step.frames.count
