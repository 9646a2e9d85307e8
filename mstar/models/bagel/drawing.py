"""Drawing: the flow of one or several images from the contexts of a request."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mstar.engine.kvcache import KVCache
from mstar.engine.lm import LanguageModel
from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.engine.spans import Span
from mstar.engine.traps import gather
from mstar.models.bagel.flow import UNGUIDED, FlowCall
from mstar.models.bagel.plan import Drawing, Plan
from mstar.models.bagel.runners import Drawn
from mstar.models.bagel.taylorseer import TaylorSeer

__all__ = ["Branches", "draw"]


class Studio(Protocol):
    """The nodes that drawing takes."""

    lm: LanguageModel
    flow: Node
    decode: Node


@dataclass(frozen=True)
class Branches:
    """The contexts that velocities are predicted from.

    Args:
        main: everything.
        text: without the last text.
        image: without images; `None` where that is the same as `main`.
    """

    main: KVCache
    text: KVCache
    image: KVCache | None


async def draw(
    studio: Studio, request: Request, plan: Plan, branches: Branches, abreast: int
) -> None:
    """Draw all images of a request; each is given to the caller decoded.

    Args:
        abreast: how many there is room for at a time.
    """
    noise = list(enumerate(plan.drawing.noise))
    for first in range(0, len(noise), abreast):
        wave = [
            _Image(studio, request, plan.drawing, branches, index, start)
            for index, start in noise[first : first + abreast]
        ]
        drawn = await gather(*(image.draw() for image in wave))
        for image, latents in zip(wave, drawn, strict=True):
            request.usage.generated_tokens += len(latents)
            request.emit_image(
                studio.decode(Drawn(plan.drawing.grid, latents)),
                index=image.index,
                seed=plan.seed,
                **plan.notes,
            )


class _Branch:
    """One context while an image is drawn: a copy, since drafts are written behind it."""

    def __init__(self, kv: KVCache, drawing: Drawing, taylor: bool) -> None:
        self.kv = kv
        self.lead = drawing.tokens - 2
        self.positions = [kv.length + kv.offset] * drawing.tokens
        self.seer = TaylorSeer() if taylor else None

    async def hidden(self, lm: LanguageModel, tokens: Tensor) -> Tensor:
        """What the last layer puts out for the latent tokens, `[tokens, hidden]`."""
        if self.seer is not None and not self.seer.is_due:
            return self.seer.predict()
        step = await lm(
            Span(
                self.kv,
                tokens,
                len(tokens),
                self.positions,
                causal=False,
                keep=False,
                lead=self.lead,
                hidden=True,
            )
        )
        return step.hidden if self.seer is None else self.seer.observe(step.hidden)


class _Image:
    def __init__(
        self,
        studio: Studio,
        request: Request,
        drawing: Drawing,
        branches: Branches,
        index: int,
        noise: Tensor,
    ) -> None:
        self.studio, self.request, self.drawing = studio, request, drawing
        self.contexts = branches
        self.index = index
        self.noise = noise

    async def draw(self) -> Tensor:
        """Latents float32 `[tokens, latent_dim]`."""
        drawing, contexts = self.drawing, self.contexts
        steps, guidance = drawing.steps, drawing.guidance
        taylor = self.request.params["enable_taylorseer"]
        with ExitStack() as stack:

            def branch(kv: KVCache | None, needed: bool) -> _Branch | None:
                if kv is None or not needed:
                    return None
                return _Branch(stack.enter_context(kv.fork()), drawing, taylor)

            guided = drawing.is_guided
            main = branch(contexts.main, True)
            text = branch(contexts.text, guided and guidance.by_text)
            image = branch(contexts.image, guided and guidance.by_image)
            latents = self.noise.to(self.studio.lm.device)
            latents, tokens = await self.studio.flow(FlowCall(drawing.grid, latents, steps[0].t))
            for index, step in enumerate(steps):
                wanted = (main, text, image) if step.guided else (main, None, None)
                hidden = await self._hidden(wanted, tokens)
                next_t = steps[index + 1].t if index + 1 < len(steps) else 0.0
                mixed = guidance if step.guided else UNGUIDED
                call = FlowCall(drawing.grid, latents, next_t, step.dt, hidden, mixed)
                moved, tokens = await self.studio.flow(call)
                await self._tell(index + 1, call, moved)
                latents = moved
        return latents

    async def _hidden(
        self, branches: tuple[_Branch | None, ...], tokens: Tensor
    ) -> tuple[Tensor | None, ...]:
        lm = self.studio.lm
        needed = [branch for branch in branches if branch is not None]
        found = iter(await gather(*(branch.hidden(lm, tokens) for branch in needed)))
        return tuple(None if branch is None else next(found) for branch in branches)

    async def _tell(self, done: int, call: FlowCall, moved: Tensor) -> None:
        """Tell the caller how far the image is, if that was asked for.

        Whoever wants previews waits for them, so that they do not pile up before the images of
        others.
        """
        params, steps = self.request.params, len(self.drawing.steps)
        every = params["preview_every"]
        if every and done % every == 0 and done < steps:
            # The flow is straight: from here it would end at x - t * velocity.
            velocity = (call.latents - moved) / call.dt
            end = moved - call.next_t * velocity
            preview = await self.studio.decode(Drawn(call.grid, end))
            self.request.emit_progress(done, steps, preview, index=self.index)
        elif params["progress"]:
            self.request.emit_progress(done, steps, index=self.index)
