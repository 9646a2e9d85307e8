"""pi0.5: an observation is read once, then a flow leads from noise to a chunk of actions."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mstar.engine.captured import Record, record
from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.errors import InvalidRequest
from mstar.io.rgb import rgb_of, shown
from mstar.models.base import Inputs, Model, Setup
from mstar.models.parameters import demand
from mstar.models.pi05.attention import KeysValues
from mstar.models.pi05.config import IMAGES
from mstar.models.pi05.flow import Steered, Velocity
from mstar.models.pi05.networks import Policy, load_policy, policy_config
from mstar.models.pi05.processing import Prepared, Processor
from mstar.models.pi05.robots import Robot, robot_for, robot_of
from mstar.models.pi05.rtc import guided, trained
from mstar.models.pi05.whole import Plan, WholeCall

__all__ = ["Pi05"]

log = logging.getLogger("mstar")
_MOST_ROBOTS = 64
_MOST_TABLED = 256  # steps: at full size 117 MB


@dataclass(frozen=True, eq=False)
class _Step:
    """One step of the flow: `x + dt * velocity(x, index)`."""

    velocity: Velocity
    x: Tensor
    index: int
    dt: float


class Pi05(Model):
    """On a CPU: nodes `read` and `step`, between which a request can end. Robots that call at once
    take turns; each is computed by itself.

    On a GPU, or where flows are shared (option `batch`): a node `act`, see `whole.py`.

    Either way the same observation and noise give the same bits in any company.

    Args:
        batch: robots that share a flow.
        record: of `engine.captured`, on a GPU.
    """

    quantized = r"^(prefix|expert)\.layers\.\d+\."
    options = (
        "statistics",
        "tokenizer",
        "resize",
        "state_padded_prompt",
        "state_in_prompt",
        "horizon",
        "batch",
    )

    def __init__(
        self,
        policy: Policy,
        processor: Processor,
        device: torch.device,
        batch: int = 1,
        record: Record | None = None,
    ) -> None:
        self.policy, self.processor = policy, processor
        self.config = policy.config
        self.networks = (policy,)
        self.device = device
        self._tables: dict[int, Tensor] = {}  # the last one that was used is the last one here
        self.read = Node("read", self._read, max_batch=1)
        self.step = Node("step", self._step)
        self.whole: WholeCall | None = None
        if record is not None or batch > 1:
            self.whole = whole = WholeCall(policy, processor, self._table, device, batch, record)
            self.act = Node("act", whole.run, key=whole.bucket, max_batch=batch)

    @classmethod
    def load(cls, setup: Setup) -> Pi05:
        """See `Model.load`. Options: `batch`; `horizon` and `state_in_prompt`, where the files do
        not say or say otherwise; those of `Processor`."""
        folder, options = setup.folders["pi05"], dict(setup.options)
        batch = options.pop("batch", 1)
        fits = isinstance(batch, int) and not isinstance(batch, bool)
        fits = fits and 1 <= batch <= _MOST_ROBOTS
        demand(fits, "batch", batch, f"must be from 1 to {_MOST_ROBOTS}")
        horizon = options.pop("horizon", None)
        fits = horizon is None or (isinstance(horizon, int) and horizon >= 1)
        demand(fits, "horizon", horizon, "must be an integer of at least 1")
        config = policy_config(folder, horizon)
        spelled = options.pop("state_in_prompt", config.state_in_prompt)
        demand(isinstance(spelled, bool), "state_in_prompt", spelled, "must be true or false")
        config = replace(config, state_in_prompt=spelled)
        processor = Processor.from_folder(folder, config, **options)
        policy = load_policy(folder, config=config, **setup.filling)
        log.info("pi05: %s", processor.assumed)
        capture = record() if setup.device.type == "cuda" else None
        return cls(policy, processor, setup.device, batch, capture)

    @property
    def nodes(self) -> Sequence[Node]:
        """See `Model.nodes`."""
        return (self.read, self.step) if self.whole is None else (self.act,)

    # -- laying a request out ----------------------------------------------------------------

    def prepare(self, inputs: Inputs, params: dict[str, Any], outputs: tuple[str, ...]) -> Plan:
        """See `Model.prepare`."""
        if not params["raw"]:
            self.processor.check_robot_units()
        seen = self.processor.prepare(
            self._cameras(inputs.images), params["robot_state"], inputs.text
        )
        steps = params["num_steps"] or self.config.num_inference_steps
        steered = self._steered(params, steps)
        return Plan(seen, self._noise(params), steps, steered, params["raw"])

    def _cameras(self, images: Sequence[Any]) -> Mapping[str, Any]:
        """Camera -> image, also by lerobot's full names; images in a list go to the cameras in
        their order."""
        names = self.config.cameras
        allowed = f"the policy has {len(names)} cameras: {', '.join(names)}"
        demand(len(images) <= len(names), "images", f"{len(images)} images", allowed)
        named = len(images) == 1 and isinstance(images[0], Mapping)
        given = images[0] if named else dict(zip(names, images, strict=False))
        short = {str(name).removeprefix(IMAGES): image for name, image in given.items()}
        return {name: _decoded(name, image) for name, image in short.items()}

    def _noise(self, params: dict[str, Any]) -> Tensor:
        shape = self.config.chunk_size, self.config.max_action_dim
        given = params["noise"]
        if given is None:
            seed = secrets.randbits(63) if params["seed"] is None else params["seed"]
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        fits = given.shape in (shape, (1, *shape))
        demand(fits, "noise", f"array {given.shape}", f"must be {shape}")
        return torch.from_numpy(given.astype(np.float32)).view(shape)

    def _steered(self, params: dict[str, Any], steps: int) -> Steered | None:
        left = params["prev_chunk_left_over"]
        if left is None or not left.size:
            return None
        previous = torch.from_numpy(left.astype(np.float32))
        if previous.ndim == 3 and len(previous) == 1:
            previous = previous[0]
        what = f"array {tuple(previous.shape)}"
        demand(previous.ndim == 2, "prev_chunk_left_over", what, "must be [rows, action_dim]")
        config, delay = self.config, params["inference_delay"] or 0
        size = {"horizon": config.chunk_size, "actions": config.max_action_dim}
        mode = params["rtc_mode"] or ("trained" if config.rtc_training_max_delay else "guided")
        rtc = {**config.rtc, **{name: value for name, value in params.items() if value is not None}}
        if mode == "trained":
            most = config.rtc_training_max_delay
            demand(most > 0, "rtc_mode", mode, "the policy was not trained for it")
            prefix = trained(previous, delay=delay, max_delay=most, **size)
            return prefix if delay else None
        return guided(
            previous,
            delay=delay,
            steps=steps,
            schedule=rtc["prefix_attention_schedule"],
            execution_horizon=rtc["execution_horizon"],
            max_weight=rtc["max_guidance_weight"],
            **size,
        )

    # -- the walk ----------------------------------------------------------------------------

    async def walk(self, request: Request) -> str:
        """Read, flow, give. On a CPU, a request can end between the steps: its deadline, or its
        caller."""
        plan: Plan = request.inputs
        request.usage.prompt_tokens = len(plan.seen.ids)
        actions = await (self._steps(plan) if self.whole is None else self.act(plan))
        actions = actions.astype(np.float32)
        form = {"dtype": "float32", "shape": list(actions.shape)}
        request.emit_actions(actions, cameras=plan.seen.cameras, **form)
        return "stop"

    async def _steps(self, plan: Plan) -> np.ndarray:
        """Actions, one step of the flow after the other."""
        kv = await self.read(plan.seen)
        velocity = self.policy.velocity(kv, self._table(plan.steps))
        if plan.steered is not None:
            velocity = plan.steered.steer(velocity, plan.steps)
        x = plan.noise.unsqueeze(0)
        for index in range(plan.steps):
            x = await self.step(_Step(velocity, x, index, -1.0 / plan.steps))
        actions = (x if plan.steered is None else plan.steered.finish(x))[0].numpy()
        if plan.raw:
            return actions[:, : self.processor.action_dim].copy()
        return self.processor.finish(actions, plan.seen.state)

    def _table(self, steps: int) -> Tensor:
        """`Policy.table`; the last one is kept, and others as far as there is room."""
        tables = self._tables
        tables[steps] = found = tables.pop(steps) if steps in tables else self.policy.table(steps)
        while len(tables) > 1 and sum(tables) > _MOST_TABLED:
            del tables[next(iter(tables))]
        return found

    def _read(self, batch: list[Prepared]) -> list[KeysValues]:
        return [self.policy.read(seen.images.to(self.device), seen.ids) for seen in batch]

    def _step(self, batch: list[_Step]) -> list[Tensor]:
        return [call.x + call.dt * call.velocity(call.x, call.index) for call in batch]

    def warmup(self) -> None:
        """See `Model.warmup`."""
        self._table(self.config.num_inference_steps)
        if self.whole is not None:
            self.whole.warmup()

    def policy_of(self, engine: Any, robot: Any, rename: Mapping[str, str] | None) -> Any:
        """See `Model.policy_of`: a `RobotPolicy`."""
        from mstar.models.pi05.policy import RobotPolicy

        return RobotPolicy(engine, robot, rename)

    # -- robots ------------------------------------------------------------------------------

    def robot(self, robot: str | Mapping[str, Any] | Robot | None) -> Robot:
        """The robot that is meant, see `robot_for`; that of the checkpoint if none is."""
        if robot is None:
            return robot_of(self.config, self.processor.rename)
        return robot_for(robot, deltas=self.config.layout == "openpi")


def _decoded(camera: str, image: Any) -> Any:
    """Files as images; arrays and images as they are."""
    if not isinstance(image, (str, PathLike, bytes, bytearray, memoryview, tuple)):
        return image
    try:
        return rgb_of(image)
    except ValueError as error:
        raise InvalidRequest(f"images.{camera}", shown(image), str(error)) from None
