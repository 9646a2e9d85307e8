"""pi0.5: an observation is read once, then a flow leads from noise to a chunk of actions."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.errors import InvalidRequest
from mstar.io.rgb import rgb_of, shown
from mstar.models.base import Inputs, Model, Setup
from mstar.models.pi05.attention import KeysValues
from mstar.models.pi05.flow import Steered, Velocity
from mstar.models.pi05.networks import Policy, load_policy, policy_config
from mstar.models.pi05.processing import Prepared, Processor
from mstar.models.pi05.robots import PRESETS, Robot, robot_of
from mstar.models.pi05.rtc import guided, trained

__all__ = ["Pi05"]

log = logging.getLogger("mstar")
_MOST_TABLED = 64  # steps: at full size 29 MB; the tables of longer flows are not kept


@dataclass(frozen=True, eq=False)
class _Plan:
    """An observation, laid out, and how its actions are to be found."""

    seen: Prepared
    noise: Tensor
    steps: int
    steered: Steered | None


@dataclass(frozen=True, eq=False)
class _Step:
    """One step of the flow: `x + dt * velocity(x, index)`."""

    velocity: Velocity
    x: Tensor
    index: int
    dt: float


class Pi05(Model):
    """Nodes `read` and `step`.

    Each call is computed by itself, also where several robots share a batch: the same observation
    and noise give the same bits in any company.
    """

    options = ("statistics", "tokenizer", "resize", "state_padded_prompt", "horizon")

    def __init__(self, policy: Policy, processor: Processor, device: torch.device) -> None:
        self.policy, self.processor = policy, processor
        self.config = policy.config
        self.networks = (policy,)
        self.device = device
        self._tables: dict[int, Tensor] = {}
        self.read = Node("read", self._read, max_batch=16)
        self.step = Node("step", self._step, max_batch=64)

    @classmethod
    def load(cls, setup: Setup) -> Pi05:
        """See `Model.load`. Options: `statistics`, `tokenizer`, `resize`, `horizon`,
        `state_padded_prompt`; see `Processor`."""
        folder, options = setup.folders["pi05"], dict(setup.options)
        config = policy_config(folder, options.pop("horizon", None))
        processor = Processor.from_folder(folder, config, **options)
        policy = load_policy(
            folder,
            device=setup.device,
            dtype=setup.dtype,
            config=config,
            dummy=setup.dummy,
            progress=setup.progress,
        )
        log.info("pi05: %s", processor.assumed)
        return cls(policy, processor, setup.device)

    @property
    def nodes(self) -> Sequence[Node]:
        """See `Model.nodes`."""
        return (self.read, self.step)

    # -- laying a request out ----------------------------------------------------------------

    def prepare(self, inputs: Inputs, params: dict[str, Any], outputs: tuple[str, ...]) -> _Plan:
        """See `Model.prepare`."""
        if not params["raw"]:
            self.processor.check_robot_units()
        seen = self.processor.prepare(
            self._cameras(inputs.images), params["robot_state"], inputs.text
        )
        steps = params["num_steps"] or self.config.num_inference_steps
        return _Plan(seen, self._noise(params), steps, self._steered(params, steps))

    def _cameras(self, images: Sequence[Any]) -> Mapping[str, Any]:
        """Camera -> image; images in a list go to the cameras in their order."""
        names = self.config.cameras
        if len(images) == 1 and isinstance(images[0], Mapping):
            given = images[0]
        elif len(images) > len(names):
            allowed = f"the policy has {len(names)} cameras: {', '.join(names)}"
            raise InvalidRequest("images", f"{len(images)} images", allowed)
        else:
            given = dict(zip(names, images, strict=False))
        return {name: _decoded(name, image) for name, image in given.items()}

    def _noise(self, params: dict[str, Any]) -> Tensor:
        shape = self.config.chunk_size, self.config.max_action_dim
        given = params["noise"]
        if given is None:
            seed = secrets.randbits(63) if params["seed"] is None else params["seed"]
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if given.shape not in (shape, (1, *shape)):
            raise InvalidRequest("noise", f"array {given.shape}", f"must be {shape}")
        return torch.tensor(given, dtype=torch.float32).view(shape)

    def _steered(self, params: dict[str, Any], steps: int) -> Steered | None:
        left = params["prev_chunk_left_over"]
        if left is None:
            return None
        previous = torch.tensor(left, dtype=torch.float32)
        if previous.ndim != 2:
            shown = f"array {tuple(previous.shape)}"
            raise InvalidRequest("prev_chunk_left_over", shown, "must be [rows, action_dim]")
        config, delay = self.config, params["inference_delay"] or 0
        size = {"horizon": config.chunk_size, "actions": config.max_action_dim}
        mode = params["rtc_mode"] or ("trained" if config.rtc_training_max_delay else "guided")
        previous = previous.to(self.device)
        if mode == "trained":
            most = config.rtc_training_max_delay
            prefix = trained(previous, delay=delay, max_delay=most, **size)
            return prefix if delay else None
        return guided(
            previous,
            delay=delay,
            steps=steps,
            schedule=params["prefix_attention_schedule"],
            execution_horizon=params["execution_horizon"],
            max_weight=params["max_guidance_weight"],
            **size,
        )

    # -- the walk ----------------------------------------------------------------------------

    async def walk(self, request: Request) -> str:
        """Read, flow, give. Between the steps a request can end: its deadline, or its caller."""
        plan: _Plan = request.inputs
        request.usage.prompt_tokens = len(plan.seen.ids)
        kv = await self.read(plan.seen)
        velocity = self.policy.velocity(kv, self._table(plan.steps))
        if plan.steered is not None:
            velocity = plan.steered.steer(velocity, plan.steps)
        x = plan.noise.to(self.device).unsqueeze(0)
        for index in range(plan.steps):
            x = await self.step(_Step(velocity, x, index, -1.0 / plan.steps))
        if plan.steered is not None:
            x = plan.steered.finish(x)
        actions = x[0].cpu().numpy()
        if request.params["raw"]:
            actions = actions[:, : self.processor.action_dim].copy()
        else:
            actions = self.processor.finish(actions, plan.seen.state)
        actions = actions.astype(np.float32)
        form = {"dtype": "float32", "shape": list(actions.shape)}
        request.emit_actions(actions, cameras=plan.seen.cameras, **form)
        return "stop"

    def _table(self, steps: int) -> Tensor:
        if steps not in self._tables:
            if steps > _MOST_TABLED:
                return self.policy.table(steps)
            if len(self._tables) > 8:
                self._tables.clear()
            self._tables[steps] = self.policy.table(steps)
        return self._tables[steps]

    def _read(self, batch: list[Prepared]) -> list[KeysValues]:
        policy, found = self.policy, []
        for seen in batch:
            images = policy.encode_images(seen.images.to(self.device)).flatten(0, 1)
            text = policy.embed_text(seen.ids.to(self.device)).to(images.dtype)
            found.append(policy.prefix(torch.cat([images, text]).unsqueeze(0)))
        return found

    def _step(self, batch: list[_Step]) -> list[Tensor]:
        return [call.x + call.dt * call.velocity(call.x, call.index) for call in batch]

    def warmup(self) -> None:
        """See `Model.warmup`."""
        self._table(self.config.num_inference_steps)

    def policy_of(self, engine: Any, robot: Any, rename: Mapping[str, str] | None) -> Any:
        """See `Model.policy_of`: a `RobotPolicy`."""
        from mstar.models.pi05.policy import RobotPolicy

        return RobotPolicy(engine, robot, rename)

    # -- robots ------------------------------------------------------------------------------

    def robot(self, robot: str | Robot | None) -> Robot:
        """The robot that is meant; that of the checkpoint if none is.

        Raises:
            InvalidRequest: nobody knows it.
        """
        if robot is None:
            return robot_of(self.config, self.processor.rename)
        if isinstance(robot, Robot):
            return robot
        if robot not in PRESETS:
            allowed = f"must be one of {', '.join(PRESETS)}, or a Robot"
            raise InvalidRequest("robot", robot, allowed)
        return PRESETS[robot]


def _decoded(camera: str, image: Any) -> Any:
    """Files as images; arrays and images as they are."""
    if not isinstance(image, (str, PathLike, bytes, bytearray, memoryview, tuple)):
        return image
    try:
        return rgb_of(image)
    except ValueError as error:
        raise InvalidRequest(f"images.{camera}", shown(image), str(error)) from None
