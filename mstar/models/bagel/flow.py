"""The node of the flow: which steps go together, and the pages of KV cache that they take."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import product

import torch
from torch import Tensor

from mstar.engine.kvcache import KVGroup
from mstar.engine.node import Node
from mstar.engine.pages import PagesExhausted
from mstar.engine.traps import Call
from mstar.errors import OutOfMemory
from mstar.models.bagel.guidance import UNGUIDED
from mstar.models.bagel.positions import Grid
from mstar.models.bagel.schedule import FlowStep
from mstar.models.bagel.stepping import Draft, FlowCall, Stepper

__all__ = ["Flow"]

_AHEAD = 2  # steps that a GPU may have before it


class Flow(Node):
    """Takes `FlowCall`s, gives their latents at the next timestep.

    A batch holds steps of images of one size, each with all its branches.

    Args:
        budget: most tokens of a batch; one image always fits.
    """

    def __init__(self, stepper: Stepper, budget: int) -> None:
        super().__init__("flow", self._run)
        self.stepper = stepper
        self._pool = stepper.pool
        self.budget = budget
        self._launched: deque[torch.cuda.Event] = deque()

    def bind(self, schedule: Callable[[Node], None]) -> None:
        """Tell whom to notify when calls that waited for pages may go on."""
        self._pool.on_release.append(lambda: self._only and schedule(self))

    def enqueue(self, call: Call) -> None:
        _group(call).waiting += 1
        super().enqueue(call)

    def withdrawn(self, call: Call) -> None:
        """See `Node.withdrawn`. Its sequences are idle now: others may take their pages."""
        if call in self._only:
            self._remove(call)
            self._pool.released()

    def take(self) -> list[Call]:
        """The next batch, with its pages reserved: sizes take turns, and so do images where not
        all of them go together."""
        for grid in dict.fromkeys(call.payload.grid for call in self._only):
            batch = self._of_size(grid)
            for call in batch:
                self._remove(call)
            if batch:
                return batch
        return []

    def warmup(self, grid: Grid) -> None:
        """Capture steps of images of a size: as many as go together, with and without guidance by
        text, and one that is guided by an image, too. None of it where nothing is captured."""
        if self.stepper.captured is None:
            return
        rows = grid[0] * grid[1]
        dim = self.stepper.bagel.config.patch_latent_dim
        still = torch.zeros(rows, dim, device=self._pool.tensor.device)
        most = max(1, self.budget // (2 * (rows + 2)))
        for images, branches in [*product(range(most, 0, -1), (2, 1)), (1, 3)]:
            # What does not fit will never be drawn together.
            with suppress(PagesExhausted), ExitStack() as stack:
                context = stack.enter_context(self._pool.open())
                calls = []
                for _ in range(images):
                    drafts = [Draft(stack.enter_context(context.fork())) for _ in range(branches)]
                    padded = (*drafts, *[None] * (3 - branches))
                    calls.append(FlowCall(grid, still, FlowStep(1.0, 1.0, False), padded, UNGUIDED))
                    _reserve(calls[-1], set())
                self._run(calls)

    def _remove(self, call: Call) -> None:
        self._only.remove(call)
        _group(call).waiting -= 1

    def _of_size(self, grid: Grid) -> list[Call]:
        batch: list[Call] = []
        busy: set[KVGroup] = set()
        room = self.budget
        for call in [call for call in self._only if call.payload.grid == grid]:
            asked: FlowCall = call.payload
            size = len(asked.branches) * asked.tokens
            if batch and size > room:
                continue
            try:
                _reserve(asked, busy)
            except Exception as error:
                exhausted = isinstance(error, PagesExhausted)
                if batch or (exhausted and not self._pool.is_alone(_group(call))):
                    continue  # it waits, and will be the first in line
                return [call]  # it never fits: `_run` says so
            busy.add(_group(call))
            batch.append(call)
            room -= size
        return batch

    def _run(self, calls: list[FlowCall]) -> list[Tensor]:
        for call in calls:
            try:
                _reserve(call, set())  # all have their pages but one that never gets them
            except PagesExhausted as error:
                raise OutOfMemory(
                    f"the KV cache holds {self._pool.capacity} tokens, too few for the "
                    f"{len(call.branches)} contexts of an image of {call.tokens}"
                ) from error
        moved = list(self._in_pace(calls))
        self._pool.released()  # the sequences are idle now: calls of another node may want pages
        return moved

    def _in_pace(self, calls: list[FlowCall]) -> Tensor:
        """A GPU gets steps no faster than it takes them: who comes in later is to join soon, and
        progress is to be true."""
        if not self._pool.tensor.is_cuda:
            return self.stepper.run(calls)
        if len(self._launched) == _AHEAD:
            self._launched.popleft().synchronize()
        moved = self.stepper.run(calls)
        event = torch.cuda.Event()
        event.record()
        self._launched.append(event)
        return moved


def _group(call: Call) -> KVGroup:
    return call.payload.drafts[0].kv.group


def _reserve(call: FlowCall, busy: set[KVGroup]) -> None:
    for draft in call.branches:
        draft.kv.reserve(call.tokens, busy)
