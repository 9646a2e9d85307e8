"""A call as one step: vision, prefix, all of the flow, robot units. On a GPU it is captured, one
graph per bucket of (cameras, text length).

Text is padded to the bucket's length; padding is masked as a key and stands behind all that is
valid, so it changes nothing but the last bits of sums. Robots that call at once may share a flow:
each is read by itself, then all are rows of a batch. It has always the same number of rows, copies
if need be, since a product's last bits depend on how many rows it has: whoever shares the batch,
the same observation and noise give the same bits.

A `RobotPolicy` takes actions in the model's space, and its robot's conventions, which are Python,
follow on the host: microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mstar.engine.captured import CapturedSteps, Record
from mstar.models.pi05.attention import joined
from mstar.models.pi05.flow import Steered
from mstar.models.pi05.networks import Policy
from mstar.models.pi05.processing import Prepared, Processor
from mstar.models.pi05.rtc import Guided, HardPrefix

__all__ = ["Plan", "WholeCall"]

_GRAIN = 32  # ids: the text of a bucket is as long as a multiple of it
_LONGEST = 64  # steps of a flow that is captured
_LAZY = 64  # buckets that are captured beside those of the warm-up


@dataclass(frozen=True, eq=False)
class Plan:
    """An observation, laid out, and how its actions are to be found.

    Args:
        noise: float32 `[horizon, actions]`.
        raw: whether actions stay in the model's normalised space.
    """

    seen: Prepared
    noise: Tensor
    steps: int
    steered: Steered | None
    raw: bool


class WholeCall:
    """Computes plans of one bucket together.

    Args:
        table: `Policy.table`, or what remembers it.
        rows: of a flow: most plans at a time.
        record: of `engine.captured`; None to capture nothing.
    """

    def __init__(
        self,
        policy: Policy,
        processor: Processor,
        table: Callable[[int], Tensor],
        device: torch.device,
        rows: int = 1,
        record: Record | None = None,
    ) -> None:
        self.policy, self.processor, self.config = policy, processor, policy.config
        self.rows = rows
        self._table, self._finish = table, processor.finish_on(device)
        present = len(self.config.cameras) - self.config.empty_cameras
        longest = processor.tokenizer.max_length
        self._rooms = [*range(_GRAIN, longest, _GRAIN), longest]
        self._cameras = range(present, 0, -1)
        self._kinds = [Guided, *([HardPrefix] if self.config.rtc_training_max_delay else [])]
        most = len(self._rooms) * present * rows * len(self._kinds) + _LAZY
        self._captured = CapturedSteps(record, device, most)
        self._as_it_is = CapturedSteps(None, device)

    def bucket(self, plan: Plan) -> Hashable:
        """Plans can be computed together where this is equal."""
        room = self._room(len(plan.seen.ids))
        return len(plan.seen.images), room, plan.steps, _kind(plan.steered)

    def run(self, plans: Sequence[Plan]) -> list[np.ndarray]:
        """Actions `[horizon, action_dim]` of plans of one bucket, at most `rows` of them."""
        steps, kind = plans[0].steps, _kind(plans[0].steered)
        ids = torch.zeros(len(plans), self._room(len(plans[0].seen.ids)), dtype=torch.int64)
        for row, plan in zip(ids, plans, strict=True):
            row[: len(plan.seen.ids)] = plan.seen.ids
        steering = [(plan.steered or self._unsteered(steps)).tensors for plan in plans]
        inputs = (
            _stacked([plan.seen.images for plan in plans]),
            ids,
            torch.tensor([len(plan.seen.ids) for plan in plans]),
            torch.stack([plan.noise for plan in plans]),
            torch.stack([torch.from_numpy(self.processor.base(p.seen.state)) for p in plans]),
            *map(torch.cat, zip(*steering, strict=True)),
        )
        captured = self._captured if steps <= _LONGEST else self._as_it_is
        normalised, finished = captured.run(self._step(steps, kind), *inputs, key=(steps, kind))
        raws = [plan.raw for plan in plans]
        normalised = normalised.cpu().numpy() if any(raws) else normalised
        finished = finished if all(raws) else finished.cpu().numpy()
        return [(normalised if raw else finished)[row] for row, raw in enumerate(raws)]

    def warmup(self) -> None:
        """Run every bucket of a flow with the usual number of steps. Those of other numbers are
        captured when they first come."""
        config, steps = self.config, self.config.num_inference_steps
        chunk = torch.zeros(1, config.chunk_size, config.max_action_dim)
        no_prefix = HardPrefix(chunk, torch.zeros(chunk.shape[:2], dtype=torch.bool))
        state = np.zeros(1, self.processor.dtype)
        for cameras in self._cameras:
            images = torch.zeros(cameras, 3, *config.vision.image_size)
            for room in reversed(self._rooms):
                seen = Prepared(images, torch.zeros(room, dtype=torch.int64), state, state, ())
                for kind in self._kinds:
                    steered = no_prefix if kind is HardPrefix else None
                    plan = Plan(seen, chunk[0], steps, steered, True)
                    for count in range(self.rows, 0, -1):
                        self.run([plan] * count)

    def _step(self, steps: int, kind: type) -> Callable[..., tuple[Tensor, Tensor]]:
        """The step of a bucket; see `engine.captured`."""
        policy, table = self.policy, self._table(steps)

        def step(
            images: Tensor,
            ids: Tensor,
            lengths: Tensor,
            noise: Tensor,
            base: Tensor,
            *steering: Tensor,
        ) -> tuple[Tensor, Tensor]:
            count = len(images)
            parts = [policy.read(images[n], ids[n], lengths[n : n + 1]) for n in range(count)]
            kv = joined(parts + parts[:1] * (self.rows - count))
            noise, *steering = (self._filled(x) for x in (noise, *steering))
            x = policy.denoise(kv, noise, table, kind(*steering))
            x = x[:count, :, : self.processor.action_dim]
            return x, self._finish(x, base)

        return step

    def _filled(self, x: Tensor) -> Tensor:
        """With copies of the first row up to `rows`."""
        missing = self.rows - len(x)
        return torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) if missing else x

    def _room(self, length: int) -> int:
        return next(room for room in self._rooms if room >= length)

    def _unsteered(self, steps: int) -> Guided:
        """Guidance to nowhere: so plain flows and guided ones are one bucket."""
        chunk = torch.zeros(1, self.config.chunk_size, self.config.max_action_dim)
        return Guided(chunk, chunk[:, :, 0], torch.zeros(1, steps))


def _stacked(images: list[Tensor]) -> Tensor:
    if len(images) == 1:
        return images[0].unsqueeze(0)
    return torch.stack([x.to(images[0].device) for x in images])


def _kind(steered: Steered | None) -> type:
    return Guided if steered is None else type(steered)
