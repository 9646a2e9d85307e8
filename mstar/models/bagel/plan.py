"""A request, checked and laid out: what is said and shown, what is to be made, with which noise."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mstar.models.bagel.card import OF_IMAGES, OF_TEXT, PARAMETERS
from mstar.models.bagel.config import BagelConfig
from mstar.models.bagel.contexts import Contexts
from mstar.models.bagel.guidance import Guidance
from mstar.models.bagel.pictures import Picture, read_picture
from mstar.models.bagel.positions import Grid
from mstar.models.bagel.prompt import Tokenizer
from mstar.models.bagel.schedule import FlowStep, flow_steps
from mstar.models.base import Inputs
from mstar.models.parameters import demand
from mstar.models.turns import turns_of

__all__ = ["Drawing", "Plan", "Planner"]


@dataclass(frozen=True)
class Drawing:
    """The images to be made: their latent tokens down and across, start noise of each, float32
    `[tokens, latent_dim]`, the steps of the flow, guidance while it is on, and a text span that it
    leads away from, if there is one."""

    grid: Grid
    noise: list[Tensor]
    steps: list[FlowStep]
    guidance: Guidance
    negative: list[int] | None

    @property
    def is_guided(self) -> bool:
        """Whether guidance is on in any step."""
        return self.guidance.by_text and any(step.guided for step in self.steps)

    @property
    def tokens(self) -> int:
        """Of one image in the decoder."""
        return self.grid[0] * self.grid[1] + 2


@dataclass(frozen=True)
class Plan:
    """What a walk needs to know.

    Args:
        elements: text spans (ids) and pictures, in order.
        think: whether to think aloud first.
        seed: of everything that is drawn.
        eps: noise of each picture for the autoencoder, `[1, z, height / f, width / f]`.
        drawing: `None` where text is to be made.
        notes: for the metadata of the images.
        contexts: what the decoder is told; made of the elements by the model, once.
    """

    elements: list[list[int] | Picture]
    think: bool
    seed: int
    eps: list[Tensor]
    drawing: Drawing | None
    notes: dict[str, Any] = field(default_factory=dict)
    contexts: Contexts = field(default_factory=Contexts)

    @property
    def is_apart(self) -> bool:
        """Whether the context without images is another than the main one."""
        return self.contexts.has_images or self.think

    @property
    def branches(self) -> int:
        """Of guidance, where it is on: the contexts that one image is drawn from."""
        by_image = self.drawing.guidance.by_image and self.is_apart
        return 1 + self.drawing.is_guided * (1 + by_image)


class Planner:
    """Makes plans, in the callers' threads.

    Args:
        side: latent tokens along the sides of the largest image.
        device: of the model.

    Attributes:
        largest, usual: pixels along the sides of images: the most, and where nothing is asked for.
    """

    def __init__(
        self, config: BagelConfig, tokenizer: Tokenizer, side: int, device: torch.device
    ) -> None:
        self.config, self.device = config, device
        self.tokenizer = tokenizer
        self.largest = side * config.latent_downsample
        self.usual = min(1024, self.largest)

    def plan(self, inputs: Inputs, params: dict[str, Any], outputs: tuple[str, ...]) -> Plan:
        """Lay a request out, or raise InvalidRequest."""
        draws = "image" in outputs
        think = params["think"]
        both = draws and "text" in outputs
        allowed = "the text beside an image is the thought before it; leave it out"
        demand(not both or think is not False, "think", False, allowed)
        think = both if think is None else think
        self._check_of_use(params, draws, think)
        elements: list[list[int] | Picture] = []
        for turn in turns_of(inputs, ("text", "image")):
            for part in turn.parts:
                if part.kind == "image":
                    picture = read_picture(part.value, self.config, draws=draws, device=self.device)
                    elements.append(picture)
                elif part.value.strip():
                    elements.append(self.tokenizer.text_span(part.value))
                else:
                    demand(inputs.messages is not None, "text", part.value, "is empty")
        there = bool(elements)
        demand(there, "messages", inputs.messages, "hold neither text nor an image")
        pictures = [element for element in elements if isinstance(element, Picture)]
        seed = secrets.randbits(63) if params["seed"] is None else params["seed"]
        # The draws of the published code, in its order: pictures first, then the start noise.
        generator = torch.Generator().manual_seed(seed)
        eps = self._eps(pictures, params["vae_noise"], generator) if draws else []
        drawing = self._drawing(pictures, params, generator) if draws else None
        return Plan(elements, think, seed, eps, drawing)

    def _check_of_use(self, params: dict[str, Any], draws: bool, think: bool) -> None:
        """Refuse parameters that were set and that this request has no use for."""
        if not draws:
            useless = (*OF_IMAGES, "max_think_tokens")
            why = "text is asked for, and this is for images: output_modalities=('image',)"
        elif not think:
            useless, why = OF_TEXT, "an image is asked for, and this is for a thought before it"
        else:
            useless, why = ("max_output_tokens",), "a thought is asked for: use max_think_tokens"
        for name in useless:
            value, usual = params[name], PARAMETERS[name].default
            unset = value is None or (usual is not None and value == usual)
            demand(unset, name, str(value)[:80], why)

    def _eps(
        self, pictures: list[Picture], given: list[Any] | None, generator: torch.Generator
    ) -> list[Tensor]:
        vae = self.config.vae
        shapes = [
            (1, vae.z_channels, *(side // vae.downsample for side in picture.size))
            for picture in pictures
        ]
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        if given is None:
            return drawn
        count, allowed = len(shapes), f"there are {len(shapes)} input images"
        demand(len(given) == count, "vae_noise", f"{len(given)} arrays", allowed)
        for array, shape in zip(given, shapes, strict=True):
            good, allowed = array.shape in (shape, shape[1:]), f"must be {shape[1:]} for this image"
            demand(good, "vae_noise", f"array {array.shape}", allowed)
        return [torch.tensor(array).view(s) for array, s in zip(given, shapes, strict=True)]

    def _drawing(
        self, pictures: list[Picture], params: dict[str, Any], generator: torch.Generator
    ) -> Drawing:
        unit = self.config.latent_downsample
        height, width = self._size(pictures, params)
        grid = height // unit, width // unit
        shape = grid[0] * grid[1], self.config.patch_latent_dim
        if (latents := params["latents"]) is None:
            noise = [torch.randn(shape, generator=generator) for _ in range(params["num_images"])]
        else:
            allowed = f"must be {shape} for an image of {width} x {height}"
            demand(latents.shape == shape, "latents", f"array {latents.shape}", allowed)
            noise = [torch.tensor(latents)]
        edit = bool(pictures)

        def chosen(name: str, drawn: Any, edited: Any) -> Any:
            return params[name] if params[name] is not None else edited if edit else drawn

        interval = chosen("cfg_interval", (0.4, 1.0), (0.0, 1.0))
        negative = params["negative_prompt"]
        drawing = Drawing(
            grid,
            noise,
            flow_steps(params["num_timesteps"], params["timestep_shift"], interval),
            Guidance(
                params["cfg_text_scale"],
                chosen("cfg_img_scale", 1.5, 2.0),
                chosen("cfg_renorm_type", "global", "text_channel"),
                params["cfg_renorm_min"],
            ),
            self.tokenizer.text_span(negative) if negative and negative.strip() else None,
        )
        why = f"cfg_text_scale={params['cfg_text_scale']} in cfg_interval={interval}"
        allowed = f"guidance leads away from it, and there is none with {why}"
        of_use = drawing.negative is None or drawing.is_guided
        demand(of_use, "negative_prompt", str(negative)[:80], allowed)
        return drawing

    def _size(self, pictures: list[Picture], params: dict[str, Any]) -> tuple[int, int]:
        """Height and width of the image: as asked, or of the last picture, or the usual."""
        unit, largest = self.config.latent_downsample, self.largest
        usual = pictures[-1].size if pictures else (self.usual,) * 2
        asked = params["height"], params["width"]
        size = tuple(own or other for own, other in zip(asked, usual, strict=True))
        for name, value in zip(("height", "width"), size, strict=True):
            below = min(max(value // unit * unit, unit), largest)
            above = min(-(-value // unit) * unit, largest)
            near = " and ".join(map(str, sorted({below, above})))
            allowed = f"must be a multiple of {unit}, at most {largest}; nearest: {near}"
            demand(value == below, name, value, allowed)
        return size
