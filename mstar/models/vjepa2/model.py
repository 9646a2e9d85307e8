"""V-JEPA 2: a clip is encoded, and what was not shown of it, or comes after it, is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mstar.engine.captured import CapturedSteps, record
from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.errors import InvalidRequest, WeightsError
from mstar.models.base import Inputs, Model, Setup
from mstar.models.vjepa2.latents import give
from mstar.models.vjepa2.networks import VJEPA2, find_config, load_networks
from mstar.models.vjepa2.preprocess import PixelRule, cropped, normalise, pixel_rule
from mstar.models.vjepa2.requests import Asked, Masks, Seen, frames_of, masks_of, still_or_clip

__all__ = ["VJepa2"]

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
        folder, options = setup.folders["vjepa2"], setup.options
        heads, longest = options.get("pooler_heads"), options.get("max_rollout", 16)
        for name, value in (("pooler_heads", heads), ("max_rollout", longest)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and (name, value) != ("pooler_heads", None):
                raise InvalidRequest(f"options.{name}", value, "must be an integer of at least 1")
        config = find_config(folder, options.get("size"))
        try:
            if config.labels:
                config.pooler(heads)
        except ValueError as error:
            raise InvalidRequest("options.pooler_heads", heads, str(error)) from None
        file = folder / "video_preprocessor_config.json"
        try:
            rule = pixel_rule(config.crop_size, file if options.get("size") is None else None)
        except (OSError, TypeError, ValueError) as error:
            raise WeightsError(f"cannot use {file}: {error}") from error
        networks = load_networks(
            folder,
            device=setup.device,
            dtype=setup.dtype,
            config=config,
            pooler_heads=heads,
            dummy=setup.dummy,
            progress=setup.progress,
        )
        return cls(networks, rule, setup.device, longest)

    @property
    def nodes(self) -> Sequence[Node]:
        """See `Model.nodes`."""
        return (self.encode, self.predict, self.classify)

    def tokens(self, frames: Tensor) -> int:
        """How many tokens the encoder makes of frames; a single one is shown for a tubelet."""
        size = self.config.tubelet_size
        count = len(frames) * size if len(frames) < size else len(frames)
        return count // size * self.grid**2

    # -- laying a request out ----------------------------------------------------------------

    def prepare(self, inputs: Inputs, params: dict[str, Any], outputs: tuple[str, ...]) -> _Plan:
        """See `Model.prepare`. Labels are made for `classify` or the output `text`; latents beside
        them if both outputs are named."""
        classify = params["classify"] or "text" in outputs
        if classify and self.net.classifier is None:
            told = ("classify", True) if params["classify"] else ("output_modalities", outputs)
            raise InvalidRequest(*told, "this checkpoint has no classifier")
        field, value = still_or_clip(inputs)
        frames = self.frames(field, value, params["num_frames"], params["fps"])
        count = self.tokens(frames)
        self._check_rollout(params, count)
        masks = self.masks(params, count)
        labels_alone = params["classify"] and outputs == ("latent",)
        return _Plan(frames, masks, classify, "latent" in outputs and not labels_alone)

    def masks(self, params: Mapping[str, Any], tokens: int) -> Masks | None:
        """See `masks_of`: the future ends where the longest clip of training, put behind this one,
        would."""
        future = self.config.frames_per_clip // self.config.tubelet_size * self.grid**2
        return masks_of(params, tokens, tokens + future)

    def frames(
        self, field: str, value: Any, num_frames: int | None = None, fps: float | None = None
    ) -> Tensor:
        """Frames of what was given as `field`; see `frames_of`."""
        return frames_of(
            field,
            value,
            partial(cropped, rule=self.rule),
            num_frames=num_frames,
            fps=fps,
            usual=self.config.frames_per_clip,
            tubelet=self.config.tubelet_size,
        )

    def _check_rollout(self, params: dict[str, Any], tokens: int) -> None:
        horizon, size = params["rollout_horizon"], self.config.tubelet_size
        if horizon > self.max_rollout:
            allowed = f"must be at most {self.max_rollout}, the engine's option max_rollout"
            raise InvalidRequest("rollout_horizon", horizon, allowed)
        if horizon < 2:
            return
        frames = params["num_output_frames"]
        if frames < size or frames // size * self.grid**2 >= tokens:
            most = (tokens // self.grid**2 - 1) * size
            allowed = f"must be from a tubelet, {size}, to less than the clip has, {most}"
            if most < size:
                allowed = f"a rollout needs a clip of at least {2 * size} frames"
            raise InvalidRequest("num_output_frames", frames, allowed)

    # -- the walk ----------------------------------------------------------------------------

    async def walk(self, request: Request) -> str:
        """Encode, then as far as was asked."""
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
            if visible is None:
                asked = self.asked(tokens, masks)
            else:
                asked = Asked(tokens, masks.context, masks.targets)
            give(request, (await self.predict(asked))[None])
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
            if params["stream_rollout"]:
                give(request, found[None])
            else:
                steps.append(found)
        for found in steps:
            give(request, found[None])

    def asked(self, tokens: Tensor, masks: Masks | None) -> Asked:
        """What the predictor is asked about a whole clip's tokens `[tokens, hidden]`; without masks
        all of them are seen, and predicted."""
        if masks is None:
            ids = torch.arange(len(tokens))
            return Asked(tokens, ids, ids)
        return Asked(tokens[masks.context.to(self.device)], masks.context, masks.targets)

    def _tell(self, request: Request, logits: Tensor, count: int) -> None:
        scores, order = logits.float().softmax(-1).cpu().sort(descending=True, stable=True)
        labels = [self.config.labels[index] for index in order[:count].tolist()]
        request.emit_text(labels[0], labels=labels, scores=scores[:count].tolist())

    # -- the nodes ---------------------------------------------------------------------------

    def _encode(self, batch: list[Seen]) -> list[Tensor]:
        frames = torch.stack([seen.frames for seen in batch]).to(self.device)
        ids = [torch.stack([seen.ids for seen in batch])] if batch[0].ids is not None else []

        def step(frames: Tensor, *ids: Tensor) -> tuple[Tensor]:
            return (self.net.encoder(normalise(frames, self.rule.mean, self.rule.std), *ids),)

        if sum(self.encode.cost(seen) for seen in batch) > _CAPTURED_TOKENS:
            return list(step(frames, *(each.to(self.device) for each in ids))[0])
        (tokens,) = self._steps.run(step, frames, *ids, key="encode")
        return list(tokens.clone())

    def _predict(self, batch: list[Asked]) -> list[Tensor]:
        names = ("context", "context_ids", "target_ids")
        inputs = [torch.stack([getattr(asked, name) for asked in batch]) for name in names]

        def step(context: Tensor, context_ids: Tensor, target_ids: Tensor) -> tuple[Tensor]:
            return (self.net.predictor(context, context_ids, target_ids, self.grid, self.grid),)

        if sum(map(self.predict.cost, batch)) > _CAPTURED_TOKENS:
            return list(step(*(each.to(self.device) for each in inputs))[0])
        (found,) = self._steps.run(step, *inputs, key="predict")
        return list(found.clone())

    def _classify(self, batch: list[Tensor]) -> list[Tensor]:
        return list(self.net.classifier(torch.stack(batch)))

    def warmup(self) -> None:
        """See `Model.warmup`: a still, and a clip of the usual length."""
        for count in (1, self.config.frames_per_clip):
            shape = count, 3, self.rule.crop, self.rule.crop
            (tokens,) = self._encode([Seen(torch.zeros(shape, dtype=torch.uint8))])
            self._predict([self.asked(tokens, None)])

    def world_of(self, engine: Any) -> Any:
        """See `Model.world_of`: a `World`."""
        from mstar.models.vjepa2.world import World

        return World(engine)
