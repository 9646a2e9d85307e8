"""Drawing: the flow of one or several images from the contexts of a request."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mstar.engine.kernels.staging import to_device
from mstar.engine.kvcache import KVCache
from mstar.engine.lm import LanguageModel
from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.engine.traps import gather
from mstar.models.bagel.flow import Flow
from mstar.models.bagel.guidance import UNGUIDED
from mstar.models.bagel.plan import Drawing, Plan
from mstar.models.bagel.runners import Drawn
from mstar.models.bagel.stepping import Draft, FlowCall
from mstar.models.bagel.taylorseer import TaylorSeer

__all__ = ["Branches", "draw"]


class Studio(Protocol):
    """The nodes that drawing takes."""

    lm: LanguageModel
    flow: Flow
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
        abreast: how many are drawn at a time.
    """
    grid, count = plan.drawing.grid, len(plan.drawing.noise)
    easel = _Easel(studio, request, plan.drawing, branches)
    for first in range(0, count, abreast):
        wave = range(first, min(first + abreast, count))
        drawn = await gather(*(easel.draw(index) for index in wave))
        for index, latents in zip(wave, drawn, strict=True):
            request.usage.generated_tokens += len(latents)
            png = studio.decode(Drawn(grid, latents))
            request.emit_image(png, index=index, seed=plan.seed, **plan.notes)


@dataclass(frozen=True)
class _Easel:
    """What all images of a request are drawn with."""

    studio: Studio
    request: Request
    drawing: Drawing
    contexts: Branches

    async def draw(self, index: int) -> Tensor:
        """Latents float32 `[tokens, latent_dim]` of one image."""
        drawing, contexts = self.drawing, self.contexts
        taylor = self.request.params["enable_taylorseer"]
        with ExitStack() as stack:

            def draft(kv: KVCache | None, needed: bool) -> Draft | None:
                if kv is None or not needed:
                    return None
                return Draft(stack.enter_context(kv.fork()), TaylorSeer() if taylor else None)

            guided = drawing.is_guided
            main = draft(contexts.main, True)
            text = draft(contexts.text, guided)
            image = draft(contexts.image, guided and drawing.guidance.by_image)
            noise = drawing.noise[index].numpy()
            latents = to_device(noise, torch.float32, self.studio.lm.device)
            for done, step in enumerate(drawing.steps, start=1):
                drafts = (main, text, image) if step.guided else (main, None, None)
                mixed = drawing.guidance if step.guided else UNGUIDED
                call = FlowCall(drawing.grid, latents, step, drafts, mixed)
                latents = await self.studio.flow(call)
                await self._tell(index, done, call, latents)
        return latents

    async def _tell(self, index: int, done: int, call: FlowCall, moved: Tensor) -> None:
        """Tell the caller how far the image is, if that was asked for.

        Whoever wants previews waits for them, so that they do not pile up before the images of
        others.
        """
        params, steps = self.request.params, len(self.drawing.steps)
        every = params["preview_every"]
        if every and done % every == 0 and done < steps:
            # The flow is straight: from here it would end at x - t * velocity.
            velocity = (call.latents - moved) / call.step.dt
            end = moved - (call.step.t - call.step.dt) * velocity
            preview = await self.studio.decode(Drawn(call.grid, end))
            self.request.emit_progress(done, steps, preview, index=index)
        elif params["progress"]:
            self.request.emit_progress(done, steps, index=index)
