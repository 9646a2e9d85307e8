"""The nodes of V-JEPA 2-AC: what is batched, and on a GPU captured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.engine.captured import CapturedSteps, record
from mstar.engine.node import Node
from mstar.models.vjepa2.ac_cache import FrameCache
from mstar.models.vjepa2.ac_requests import Search
from mstar.models.vjepa2.cem import cost
from mstar.models.vjepa2.networks import AcNetworks
from mstar.models.vjepa2.rollout import Finish, Start, Step, at_once, roll, run_through

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
    """A rollout in one piece, or the costs at its end if there is a goal; see `roll`."""

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

    def __init__(self, networks: AcNetworks) -> None:
        self.networks, self.predictor = networks, networks.predictor
        self.config, self.device = networks.config, networks.device
        on_gpu = self.device.type == "cuda"
        self.captured = CapturedSteps(record(), self.device) if on_gpu else None
        self.encode = Node("encode", self._encode, key=_alike, cost=_frames, max_cost=64)
        self.whole = Node("imagine", self._imagine, max_batch=1)
        most = self.size(1, 0)
        self.predict = Node("predict", self._predict, key=_same_place, cost=_samples, max_cost=most)

    def shapes(self, search: Search) -> Iterator[Whole]:
        """A call of `imagine` for every size of batch that a search from one frame may take, with
        or without a budget."""
        if self.captured is None:
            return
        cem, weight = search.cem, self.predictor.predictor_norm.weight
        latents = weight.new_zeros(self.config.patches, self.config.embed_dim)
        most = min(self.size(1, cem.horizon if cem.horizon > 1 else 0), cem.samples)
        sizes = {most, cem.samples % most, *(1 << power for power in range(most.bit_length()))}
        for samples in sorted(sizes - {0}):
            actions = torch.zeros(samples, cem.horizon, 7, device=self.device)
            yield Whole(Start(latents[None], True), actions, actions, latents, search.cost)

    @torch.inference_mode()
    def _encode(self, batch: list[Seeing]) -> list[Tensor]:
        frames = torch.cat([call.frames for call in batch]).to(self.device)
        pixels, counts = self.networks.pixels(frames), [len(call.frames) for call in batch]
        if batch[0].clip:
            return [self.networks.encode_clip(each) for each in pixels.split(counts)]
        if self.captured is None or len(pixels) > _FEW_FRAMES:
            found = self.networks.encode_frames(pixels)
        else:
            (found,) = self.captured.run(self._see, pixels, key="encode")
            found = found.clone()
        return list(found.split(counts))

    @torch.inference_mode()
    def _predict(self, batch: list[Step]) -> list[Tensor]:
        hidden = self.predictor([call.frames for call in batch])
        return [call.finish(each) for call, each in zip(batch, hidden, strict=True)]

    def _see(self, pixels: Tensor) -> tuple[Tensor]:
        return (self.networks.encode_frames(pixels),)

    @torch.inference_mode()
    def _imagine(self, batch: list[Whole]) -> list[Tensor]:
        (call,) = batch
        start, together, kind = call.start, call.start.together, call.kind

        def step(
            latents: Tensor,
            actions: Tensor,
            states: Tensor,
            goal: Tensor,
            extrinsics: Tensor,
            kept: Tensor,
        ) -> tuple[Tensor]:
            """What there is not is empty."""
            tokens = self.predictor.frame_tokens
            context = FrameCache(kept, tokens, own=kept.shape[4] // tokens) if len(kept) else None
            begun = Start(latents, together, extrinsics if len(extrinsics) else None, context)
            last = self.cost(goal, kind) if len(goal) else None
            predict = at_once(self.predictor)
            rolling = roll(predict, self.predictor, begun, actions, states, last=last)
            return (run_through(rolling),)

        given = (call.goal, start.extrinsics, None if start.context is None else start.context.kept)
        given = (call.actions.new_empty(0) if each is None else each for each in given)
        inputs = (start.latents, call.actions, call.states, *given)
        (made,) = self.captured.run(step, *inputs, key=("imagine", together, kind))
        return [made.clone()]

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
        kept = 2 * self.config.pred_depth * sizes.width * cached
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
