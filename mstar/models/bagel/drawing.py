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
from mstar.models.bagel.plan import Plan
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
        abreast: how many there is room for at a time.
    """
    noise = plan.drawing.noise
    for first in range(0, len(noise), abreast):
        wave = range(first, min(first + abreast, len(noise)))
        drawn = await gather(*(_image(studio, request, plan, branches, i) for i in wave))
        for index, latents in zip(wave, drawn, strict=True):
            request.usage.generated_tokens += len(latents)
            png = studio.decode(Drawn(plan.drawing.grid, latents))
            request.emit_image(png, index=index, seed=plan.seed, **plan.notes)


async def _image(
    studio: Studio, request: Request, plan: Plan, branches: Branches, index: int
) -> Tensor:
    """Latents float32 `[tokens, latent_dim]` of one image."""
    drawing = plan.drawing
    grid, guidance = drawing.grid, drawing.guidance
    taylor = request.params["enable_taylorseer"]
    with ExitStack() as stack:

        def draft(kv: KVCache | None, needed: bool) -> Draft | None:
            if kv is None or not needed:
                return None
            return Draft(stack.enter_context(kv.fork()), TaylorSeer() if taylor else None)

        main = draft(branches.main, True)
        text = draft(branches.text, drawing.is_guided)
        image = draft(branches.image, drawing.is_guided and guidance.by_image)
        latents = to_device(drawing.noise[index].numpy(), torch.float32, studio.lm.device)
        for done, step in enumerate(drawing.steps, start=1):
            drafts = (main, text, image) if step.guided else (main, None, None)
            mixed = guidance if step.guided else UNGUIDED
            call = FlowCall(grid, latents, step, drafts, mixed)
            latents = await studio.flow(call)
            await _tell(studio, request, len(drawing.steps), index, done, call, latents)
    return latents


async def _tell(
    studio: Studio,
    request: Request,
    steps: int,
    index: int,
    done: int,
    call: FlowCall,
    moved: Tensor,
) -> None:
    """Tell the caller how far the image is, if that was asked for.

    Whoever wants previews waits for them, so that they do not pile up before the images of others.
    """
    every = request.params["preview_every"]
    if every and done % every == 0 and done < steps:
        # The flow is straight: from here it would end at x - t * velocity.
        velocity = (call.latents - moved) / call.step.dt
        end = moved - (call.step.t - call.step.dt) * velocity
        preview = await studio.decode(Drawn(call.grid, end))
        request.emit_progress(done, steps, preview, index=index)
    elif request.params["progress"]:
        request.emit_progress(done, steps, index=index)
