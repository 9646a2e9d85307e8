"""What a batch of steps of the flow computes; on a GPU, as one captured graph.

Latents and timesteps become tokens of every branch of guidance, the decoder runs them behind the
branches' contexts, their velocities are mixed, and Euler's step is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mstar.engine.captured import CapturedSteps, Record, Step
from mstar.engine.kernels.dispatch import next_power_of_2
from mstar.engine.kernels.guided_euler import guided_euler
from mstar.engine.kernels.paged_batch import FEW, BatchTensors, Few, PagedBatch
from mstar.engine.kernels.staging import block_table, to_device
from mstar.engine.kvcache import KVCache, KVPool
from mstar.engine.paged_context import PagedContext
from mstar.models.bagel.guidance import Guidance, guidance_table
from mstar.models.bagel.networks import Bagel
from mstar.models.bagel.positions import Grid
from mstar.models.bagel.schedule import FlowStep
from mstar.models.bagel.taylorseer import TaylorSeer

__all__ = ["Draft", "FlowCall", "Stepper"]

_MARKS = 2  # tokens around an image; they follow its latents


@dataclass(eq=False)
class Draft:
    """A branch of guidance: a fork of a context, with room behind it for the keys and values of one
    step, and what guesses the branch in some of the steps."""

    kv: KVCache
    seer: TaylorSeer | None = None

    @property
    def is_due(self) -> bool:
        """Whether the decoder has to run."""
        return self.seer is None or self.seer.is_due


@dataclass(eq=False)
class FlowCall:
    """One step of one image.

    Args:
        grid: latent tokens down and across.
        latents: x at the step's timestep, float32 `[tokens, latent_dim]`.
        step: the timestep, and how far to go.
        drafts: the branches main, text, image; `None` for those that are not needed.
        guidance: how they are mixed.
    """

    grid: Grid
    latents: Tensor
    step: FlowStep
    drafts: tuple[Draft | None, Draft | None, Draft | None]
    guidance: Guidance

    @property
    def branches(self) -> list[Draft]:
        """Those that are needed."""
        return [draft for draft in self.drafts if draft is not None]

    @property
    def tokens(self) -> int:
        """Of one branch, in the decoder."""
        return len(self.latents) + _MARKS


class Stepper:
    """Runs steps of images of one size.

    Args:
        marks: embeddings of the start and the end of an image, `[2, hidden]`.
        record: how steps are captured: one graph for each size, number of images, number of
            branches, and power of two of pages. None for not at all.
    """

    def __init__(self, bagel: Bagel, pool: KVPool, marks: Tensor, record: Record | None) -> None:
        self.bagel, self.pool, self.marks = bagel, pool, marks
        self.device = pool.tensor.device
        self.captured = None if record is None else CapturedSteps(record, self.device)

    def run(self, calls: Sequence[FlowCall]) -> Tensor:
        """Latents `[calls, tokens, latent_dim]` at the next timesteps."""
        grid = calls[0].grid
        drafts = [(index, draft) for index, call in enumerate(calls) for draft in call.branches]
        due = [(index, draft) for index, draft in drafts if draft.is_due]
        numbers = _places(calls)
        numbers += [index for index, _ in due]
        numbers += [draft.kv.length for _, draft in due]
        numbers += [draft.kv.length + draft.kv.offset for _, draft in due]
        places, branches = to_device(numbers, torch.int64, self.device).split(
            [3 * len(calls), 3 * len(due)]
        )
        inputs = (
            torch.stack([call.latents for call in calls]),
            to_device([call.step.t for call in calls], torch.float32, self.device),
            guidance_table(
                [call.guidance for call in calls], [call.step.dt for call in calls], self.device
            ),
            places.view(3, -1),
            branches.view(3, -1),
        )
        kvs = [draft.kv for _, draft in due]
        guesses = any(draft.seer is not None for _, draft in drafts)
        if self.captured is not None and not guesses:
            pages = self._pages(kvs)
            (moved,) = self.captured.run(self._step(grid), *inputs, pages, key=grid)
            return moved.clone()
        latents, times, table, places, (image, _, position) = inputs
        states = []
        if due:
            context = self._context(kvs, len(calls[0].latents))
            states = self._hidden(grid, latents, times, image, position, context)
        if guesses:
            found = iter(states)
            states = torch.stack([_seen(draft, found) for _, draft in drafts])
        return guided_euler(latents, self.bagel.velocity(states), places, table)

    def _step(self, grid: Grid) -> Step:
        """What is captured: all of it as a function of tensors."""

        def step(
            latents: Tensor,
            times: Tensor,
            table: Tensor,
            places: Tensor,
            branches: Tensor,
            pages: Tensor,
        ) -> tuple[Tensor]:
            image, length, position = branches
            context = self._context_of(length, pages, latents.shape[1])
            states = self._hidden(grid, latents, times, image, position, context)
            return (guided_euler(latents, self.bagel.velocity(states), places, table),)

        return step

    def _hidden(
        self,
        grid: Grid,
        latents: Tensor,
        times: Tensor,
        image: Tensor,
        position: Tensor,
        context: PagedContext,
    ) -> Tensor:
        """What the last layer makes of each branch's latents, `[branches, tokens, hidden]`; the
        branches' images and positions are int64 `[branches]`."""
        tokens = self.bagel.latent_tokens(latents, times, *grid)[image]
        count, each, _ = tokens.shape
        lead = count * each
        x = torch.cat([tokens.flatten(0, 1), self.marks.repeat(count, 1)])
        positions = [position.unsqueeze(1).expand(-1, n).flatten() for n in (each, _MARKS)]
        hidden = self.bagel.decoder(x, torch.cat(positions), context, lead)
        return hidden[:lead].unflatten(0, (count, each))

    def _context(self, kvs: list[KVCache], each: int) -> PagedContext:
        """Latents first, then marks: two pieces behind every context, over the same pages."""
        count = len(kvs)
        starts = [kv.length for kv in kvs]
        batch = PagedBatch(
            [each] * count + [_MARKS] * count,
            [start + each + _MARKS for start in starts] * 2,
            [kv.pages for kv in kvs] * 2,
            [False] * 2 * count,
            self.pool.page_size,
            [start + each for start in starts] + [start + each + _MARKS for start in starts],
        )
        return PagedContext(self.pool, batch, batch.slots_on(self.device))

    def _context_of(self, length: Tensor, pages: Tensor, each: int) -> PagedContext:
        """The same from tensors: tokens in each context `[branches]`, and its pages `[branches,
        width]`, both int64."""
        count, size = len(length), self.pool.page_size
        place = length.unsqueeze(1) + torch.arange(each + _MARKS, device=length.device)
        slots = pages.gather(1, place // size) * size + place % size
        slots = torch.cat([slots[:, :each].flatten(), slots[:, each:].flatten()])
        number = torch.arange(count + 1, device=length.device)
        first, second = number[:-1] * each, number * _MARKS + count * each
        marks = torch.stack([number[:-1] + count, number[:-1] * _MARKS], 1).to(torch.int32)
        batch = BatchTensors(
            query_start=torch.cat([first, second]).to(torch.int32),
            kv_len=(length + each + _MARKS).repeat(2).to(torch.int32),
            block_table=pages.repeat(2, 1).to(torch.int32),
            causal=torch.zeros(2 * count, dtype=torch.int32, device=length.device),
            max_query_len=max(each, _MARKS),
            page_size=size,
            has_decode=each == 1,
            few=Few(marks, count * _MARKS) if each > FEW else None,
        )
        return PagedContext(self.pool, batch, slots)

    def _pages(self, kvs: list[KVCache]) -> Tensor:
        table = block_table([kv.pages for kv in kvs])
        more = next_power_of_2(table.shape[1]) - table.shape[1]
        return to_device(np.pad(table, ((0, 0), (0, more))), torch.int64, self.device)


def _places(calls: Sequence[FlowCall]) -> list[int]:
    """Which branch of all is each call's main, text and image one; main where it has none."""
    rows: tuple[list[int], ...] = ([], [], [])
    count = 0
    for call in calls:
        main = count
        for row, draft in zip(rows, call.drafts, strict=True):
            row.append(main if draft is None else count)
            count += draft is not None
    return [place for row in rows for place in row]


def _seen(draft: Draft, found: Iterator[Tensor]) -> Tensor:
    """A branch's states, which are the next of those found, or guessed."""
    if draft.seer is None:
        return next(found)
    return draft.seer.observe(next(found)) if draft.seer.is_due else draft.seer.predict()
