"""Drawing: the flow of one or several images from the contexts of a request."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.engine.kernels.staging import to_device
from mstar.engine.kvcache import KVCache
from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.engine.traps import gather
from mstar.models.bagel.flow import Flow
from mstar.models.bagel.guidance import UNGUIDED
from mstar.models.bagel.plan import Plan
from mstar.models.bagel.runners import Drawn
from mstar.models.bagel.stepping import Draft, FlowCall
from mstar.models.bagel.taylorseer import TaylorSeer

__all__ = ["Easel"]


@dataclass(frozen=True)
class Easel:
    """What all images of a request are drawn with.

    Args:
        flow, decode: the nodes.
        contexts: what velocities are predicted from: everything, that without the last text, and
            that without images, if it is not the same as everything.
    """

    flow: Flow
    decode: Node
    request: Request
    plan: Plan
    contexts: tuple[KVCache, KVCache, KVCache | None]

    async def draw_all(self, abreast: int) -> None:
        """Draw all images, so many at a time; each is given to the caller decoded."""
        request, plan = self.request, self.plan
        count = len(plan.drawing.noise)
        for first in range(0, count, abreast):
            wave = range(first, min(first + abreast, count))
            drawn = await gather(*map(self.draw, wave))
            for index, latents in zip(wave, drawn, strict=True):
                request.usage.generated_tokens += len(latents)
                png = self.decode(Drawn(plan.drawing.grid, latents))
                request.emit_image(png, index=index, seed=plan.seed, **plan.notes)

    async def draw(self, index: int) -> Tensor:
        """Latents float32 `[tokens, latent_dim]` of one image."""
        drawing = self.plan.drawing
        taylor, guided = self.request.params["enable_taylorseer"], drawing.is_guided
        used = True, guided, guided and drawing.guidance.by_image
        with ExitStack() as stack:
            drafts = tuple(
                Draft(stack.enter_context(kv.fork()), TaylorSeer() if taylor else None)
                if kv is not None and is_used
                else None
                for kv, is_used in zip(self.contexts, used, strict=True)
            )
            noise = drawing.noise[index].numpy()
            latents = to_device(noise, torch.float32, self.flow.stepper.device)
            for done, step in enumerate(drawing.steps, start=1):
                branches = drafts if step.guided else (drafts[0], None, None)
                mixed = drawing.guidance if step.guided else UNGUIDED
                call = FlowCall(drawing.grid, latents, step, branches, mixed)
                latents = await self.flow(call)
                await self._tell(index, done, call, latents)
        return latents

    async def _tell(self, index: int, done: int, call: FlowCall, moved: Tensor) -> None:
        """Tell the caller how far the image is, if that was asked for. Whoever wants previews waits
        for them, so that they do not pile up before the images of others."""
        params, steps = self.request.params, len(self.plan.drawing.steps)
        every = params["preview_every"]
        if every and done % every == 0 and done < steps:
            # The flow is straight: from here it would end at x - t * velocity.
            velocity = (call.latents - moved) / call.step.dt
            end = moved - (call.step.t - call.step.dt) * velocity
            preview = await self.decode(Drawn(call.grid, end))
            self.request.emit_progress(done, steps, preview, index=index)
        elif params["progress"]:
            self.request.emit_progress(done, steps, index=index)
