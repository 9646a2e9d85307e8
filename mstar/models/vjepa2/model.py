"""V-JEPA 2: a clip is encoded, and what was not shown of it, or comes after it, is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mstar.engine.captured import CapturedSteps, Step, record
from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.errors import InvalidRequest, WeightsError
from mstar.models.base import Inputs, Model, Setup
from mstar.models.parameters import Parameter, Parameters, demand
from mstar.models.vjepa2.config import PUBLISHED
from mstar.models.vjepa2.latents import give
from mstar.models.vjepa2.networks import BLOCKS, VJEPA2, find_config, load_networks
from mstar.models.vjepa2.preprocess import PixelRule, cropped, normalise, pixel_rule
from mstar.models.vjepa2.requests import Asked, Masks, Seen, frames_of, masks_of, still_or_clip

__all__ = ["VJepa2"]

_OPTIONS = Parameters(
    "vjepa2",
    [
        Parameter("options.size", str, choices=tuple(PUBLISHED)),
        Parameter("options.pooler_heads", int, low=1),
        Parameter("options.max_rollout", int, 16, low=1),
    ],
)
_MOST_TOKENS = 1 << 16  # of one batch
_CAPTURED_TOKENS = 1 << 12  # of a batch that is worth a captured step: larger ones take their time


@dataclass(frozen=True, eq=False)
class _Plan:
    frames: Tensor
    masks: Masks | None
    classify: bool
    latents: bool


class VJepa2(Model):
    """Nodes `encode`, `predict` and `classify`. Clips of one shape share a batch."""

    options = ("size", "pooler_heads", "max_rollout")
    quantized = BLOCKS

    def __init__(
        self, networks: VJEPA2, rule: PixelRule, device: torch.device, max_rollout: int = 16
    ) -> None:
        self.networks = (networks,)
        self.net, self.config = networks, networks.config
        self.rule, self.device = rule, device
        self.max_rollout = max_rollout
        self.grid = rule.crop // self.config.patch_size
        self._steps = CapturedSteps(record() if device.type == "cuda" else None, device)
        self.encode = Node(
            "encode",
            self._encode,
            key=lambda seen: (seen.frames.shape, None if seen.ids is None else len(seen.ids)),
            cost=lambda seen: self.tokens(seen.frames) if seen.ids is None else len(seen.ids),
            max_cost=_MOST_TOKENS,
        )
        self.predict = Node(
            "predict",
            self._predict,
            key=lambda asked: (len(asked.context_ids), len(asked.target_ids)),
            cost=lambda asked: len(asked.context_ids) + len(asked.target_ids),
            max_cost=_MOST_TOKENS,
        )
        self.classify = Node("classify", self._classify, key=len, cost=len, max_cost=_MOST_TOKENS)

    @classmethod
    def load(cls, setup: Setup) -> VJepa2:
        """See `Model.load`. Options: `size`, the published size that is meant where no config.json
        says; `pooler_heads`, of the classifier; `max_rollout`, the longest horizon."""
        folder = setup.folders["vjepa2"]
        options = {f"options.{name}": value for name, value in setup.options.items()}
        size, heads, longest = _OPTIONS.validate(options).values()
        config = find_config(folder, size)
        try:
            if config.labels:
                config.pooler(heads)
        except ValueError as error:
            raise InvalidRequest("options.pooler_heads", heads, str(error)) from None
        file = folder / "video_preprocessor_config.json"
        try:
            rule = pixel_rule(config.crop_size, file if size is None else None)
        except (OSError, TypeError, ValueError) as error:
            raise WeightsError(f"cannot use {file}: {error}") from error
        networks = load_networks(folder, config=config, pooler_heads=heads, **setup.filling)
        return cls(networks, rule, setup.device, longest)

    @property
    def nodes(self) -> Sequence[Node]:
        return (self.encode, self.predict, self.classify)

    def tokens(self, frames: Tensor) -> int:
        """How many tokens the encoder makes of frames; a single one is shown for a tubelet."""
        size = self.config.tubelet_size
        count = len(frames) * size if len(frames) < size else len(frames)
        return count // size * self.grid**2

    def prepare(self, inputs: Inputs, params: dict[str, Any], outputs: tuple[str, ...]) -> _Plan:
        """See `Model.prepare`. Labels are made for `classify` or the output `text`; latents beside
        them if both outputs are named."""
        classify = params["classify"] or "text" in outputs
        told = ("classify", True) if params["classify"] else ("output_modalities", outputs)
        able = not classify or self.net.classifier is not None
        demand(able, *told, "this checkpoint has no classifier")
        field, value = still_or_clip(inputs)
        frames = self.frames(field, value, params["num_frames"], params["fps"])
        count = self.tokens(frames)
        self._check_rollout(params, count)
        masks = self.masks(params, count)
        labels_alone = params["classify"] and outputs == ("latent",)
        return _Plan(frames, masks, classify, "latent" in outputs and not labels_alone)

    def masks(self, params: Mapping[str, Any], tokens: int) -> Masks | None:
        """See `masks_of`: the future is as long as the longest clip of training."""
        future = self.config.frames_per_clip // self.config.tubelet_size * self.grid**2
        return masks_of(params, tokens, tokens + future)

    def frames(
        self, field: str, value: Any, num_frames: int | None = None, fps: float | None = None
    ) -> Tensor:
        return frames_of(
            field,
            value,
            partial(cropped, rule=self.rule, device=self.device),
            num_frames=num_frames,
            fps=fps,
            usual=self.config.frames_per_clip,
            tubelet=self.config.tubelet_size,
        )

    def _check_rollout(self, params: dict[str, Any], tokens: int) -> None:
        horizon, size = params["rollout_horizon"], self.config.tubelet_size
        allowed = f"must be at most {self.max_rollout}, the engine's option max_rollout"
        demand(horizon <= self.max_rollout, "rollout_horizon", horizon, allowed)
        frames, most = params["num_output_frames"], (tokens // self.grid**2 - 1) * size
        allowed = f"must be from a tubelet, {size}, to less than the clip has, {most}"
        if most < size:
            allowed = f"a rollout needs a clip of at least {2 * size} frames"
        good = horizon < 2 or size <= frames < most + size
        demand(good, "num_output_frames", frames, allowed)

    async def walk(self, request: Request) -> str:
        plan: _Plan = request.inputs
        params, masks = request.params, plan.masks
        visible = masks.context if masks and params["context_only"] else None
        tokens = await self.encode(Seen(plan.frames, visible))
        if plan.classify:
            self._tell(request, await self.classify(tokens), params["top_k"])
        if not plan.latents:
            return "stop"
        if params["skip_predictor"]:
            give(request, tokens[None])
        elif params["rollout_horizon"] > 1:
            await self._rollout(request, tokens)
        else:
            asked = Asked(tokens, masks.context, masks.targets) if visible is not None else None
            give(request, (await self.predict(asked or self.asked(tokens, masks)))[None])
        return "stop"

    async def _rollout(self, request: Request, tokens: Tensor) -> None:
        params, plane = request.params, self.grid**2
        count = params["num_output_frames"] // self.config.tubelet_size * plane
        ids = torch.arange(len(tokens))
        targets = len(tokens) + plane * params["steps_ahead"] + torch.arange(count)
        steps = []
        for _ in range(params["rollout_horizon"]):
            found = await self.predict(Asked(tokens, ids, targets))
            tokens = torch.cat([tokens[count:], found])  # numbered from 0 again
            steps.append(found)
            if params["stream_rollout"]:
                give(request, steps.pop()[None])
        for found in steps:
            give(request, found[None])

    def asked(self, tokens: Tensor, masks: Masks | None) -> Asked:
        """What is asked about a whole clip's tokens `[tokens, hidden]`: all of it without masks."""
        if masks is None:
            ids = torch.arange(len(tokens))
            return Asked(tokens, ids, ids)
        return Asked(tokens[masks.context.to(self.device)], masks.context, masks.targets)

    def _tell(self, request: Request, logits: Tensor, count: int) -> None:
        scores, order = logits.float().softmax(-1).cpu().sort(descending=True, stable=True)
        labels = [self.config.labels[index] for index in order[:count].tolist()]
        request.emit_text(labels[0], labels=labels, scores=scores[:count].tolist())

    def _encode(self, batch: list[Seen]) -> list[Tensor]:
        inputs = [torch.stack([seen.frames for seen in batch])]
        if batch[0].ids is not None:
            inputs.append(torch.stack([seen.ids for seen in batch]))

        def step(frames: Tensor, *ids: Tensor) -> tuple[Tensor]:
            return (self.net.encoder(normalise(frames, self.rule.mean, self.rule.std), *ids),)

        return self._run("encode", step, inputs, sum(map(self.encode.cost, batch)))

    def _predict(self, batch: list[Asked]) -> list[Tensor]:
        names = ("context", "context_ids", "target_ids")
        inputs = [torch.stack([getattr(asked, name) for asked in batch]) for name in names]

        def step(context: Tensor, context_ids: Tensor, target_ids: Tensor) -> tuple[Tensor]:
            return (self.net.predictor(context, context_ids, target_ids, self.grid, self.grid),)

        return self._run("predict", step, inputs, sum(map(self.predict.cost, batch)))

    def _run(self, key: str, step: Step, inputs: list[Tensor], tokens: int) -> list[Tensor]:
        """One result for each of a batch."""
        if tokens > _CAPTURED_TOKENS:
            return list(step(*(each.to(self.device) for each in inputs))[0])
        return list(self._steps.run(step, *inputs, key=key)[0].clone())

    def _classify(self, batch: list[Tensor]) -> list[Tensor]:
        return list(self.net.classifier(torch.stack(batch)))

    def warmup(self) -> None:
        """See `Model.warmup`: a still, and a clip of the usual length."""
        for count in (1, self.config.frames_per_clip):
            shape = count, 3, self.rule.crop, self.rule.crop
            (tokens,) = self._encode([Seen(torch.zeros(shape, dtype=torch.uint8))])
            self._predict([self.asked(tokens, None)])

    def examples(self) -> Sequence[Mapping[str, Any]]:
        """See `Model.examples`."""
        return [{"images": Image.new("RGB", (self.rule.shortest + 8, self.rule.shortest + 1))}]

    def world_of(self, engine: Any) -> Any:
        from mstar.models.vjepa2.world import World

        return World(engine)
