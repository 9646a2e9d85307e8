"""BAGEL as plain loops over its networks: one branch after another, one request at a time.

What the goldens were made with, in the fewest words. `seen` collects what they hold, unless `watch`
is off: then nothing is computed for it alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mstar.engine.kernels.guided_euler import guided_euler
from mstar.engine.layers.attention import GrowingContext
from mstar.models.bagel.autoencoder import Autoencoder
from mstar.models.bagel.guidance import Guidance, guidance_table
from mstar.models.bagel.networks import Bagel, load_networks
from mstar.models.bagel.pixels import patchify, resized, to_pixels, to_uint8, unpatchify
from mstar.models.bagel.prompt import THINK_THEN_ANSWER, THINK_THEN_DRAW, Tokenizer
from mstar.models.bagel.schedule import flow_steps
from mstar.models.bagel.taylorseer import TaylorSeer

TINY = Path(__file__).parents[3] / "mstar" / "models" / "bagel" / "tiny" / "bagel"
DEFAULTS = {
    "num_timesteps": 50,
    "timestep_shift": 3.0,
    "cfg_text_scale": 3.0,
    "cfg_img_scale": 1.5,
    "cfg_interval": (0.4, 1.0),
    "cfg_renorm_min": 0.0,
    "cfg_renorm_type": "global",
    "enable_taylorseer": False,
}


@dataclass
class Branch:
    """A context and the next position in it."""

    kv: GrowingContext = field(default_factory=GrowingContext)
    pos: int = 0

    def fork(self) -> Branch:
        return Branch(self.kv.fork(), self.pos)

    @property
    def length(self) -> int:
        return len(self.kv.cached(0)[0]) if self.pos else 0


class Loop:
    """One request at a time."""

    def __init__(self, bagel: Bagel, autoencoder: Autoencoder, tokenizer: Tokenizer) -> None:
        self.bagel, self.autoencoder, self.tokenizer = bagel, autoencoder, tokenizer
        self.decoder = bagel.decoder
        self.p = bagel.config.latent_patch_size
        self.device = bagel.latents.vae2llm.weight.device
        self.watch = True
        self.begin()

    @classmethod
    def of_the_tiny_checkpoint(cls) -> Loop:
        networks = load_networks(TINY, device="cpu", dtype=torch.float32)
        return cls(*networks, Tokenizer(TINY))

    def begin(self, seed: int = 0) -> None:
        """A new request. What is drawn is drawn on the CPU, in the order in which it is used."""
        self.main, self.no_text, self.no_image = Branch(), Branch(), Branch()
        self.seen: dict[str, Tensor] = {}
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.images = 0
        self.size: tuple[int, int] | None = None

    # -- spans -------------------------------------------------------------------------------

    def run(
        self,
        branch: Branch,
        inputs: Tensor,
        name: str | None = None,
        *,
        causal: bool = False,
        keep: bool = True,
        lead: int = 0,
    ) -> Tensor:
        count = len(inputs)
        step = 1 if causal else 0
        positions = branch.pos + step * torch.arange(count, device=self.device)
        branch.kv.causal, branch.kv.keep = causal, keep
        layers: list[Tensor] = []
        noted = layers if self.watch and name is not None else None
        hidden = self.decoder(inputs, positions, branch.kv, lead, keep=noted)
        if keep:
            branch.pos += count if causal else 1
        if noted is not None:
            final = torch.cat([self.decoder.norm_lead(hidden[:lead]), hidden[lead:]])
            self.seen[f"{name}.position_ids"] = positions
            self.seen[f"{name}.input"] = as_published(layers[0], lead)
            self.seen[f"{name}.last_hidden"] = as_published(final, lead)
            for index, layer in enumerate(layers[1:]):
                self.seen[f"{name}.layer{index}"] = as_published(layer, lead)
        return hidden

    def marks(self) -> Tensor:
        tokens = self.tokenizer
        return self.decoder.embed(self.ids([tokens.image_start, tokens.image_end]))

    def ids(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def feed(self, branch: Branch, text: str, name: str | None = None) -> list[int]:
        ids = self.tokenizer.text_span(text)
        hidden = self.run(branch, self.ids(ids), name, causal=True)
        if self.watch and name is not None:
            self.seen[f"{name}.logits"] = self.decoder.logits(hidden)
        return ids

    def think_first(self, system: str) -> None:
        self.feed(self.main, system, "system")
        self.feed(self.no_image, system)

    def text(self, text: str) -> list[int]:
        self.no_text = self.main.fork()
        self.feed(self.no_image, text)
        return self.feed(self.main, text, "prompt")

    def image(self, image: Image.Image, *, draw: bool) -> None:
        config, n = self.bagel.config, self.images
        self.images += 1
        image = resized(image, config.vae_rule)
        self.size = image.height, image.width
        if draw:
            self.latents(to_pixels(resized(image, config.vae_rule)), f"vae{n}")
        self.look(to_pixels(resized(image, config.vit_rule)), n, "vit" if not draw else f"vit{n}")
        self.no_text = self.main.fork()

    def latents(self, pixels: Tensor, name: str) -> None:
        mean, logvar = self.autoencoder.encode(pixels[None].to(self.device))
        eps = torch.randn(mean.shape, generator=self.generator).to(self.device)
        latent = self.autoencoder.latent(mean, logvar, eps)[0]
        self.seen[f"{name}.eps"] = eps[0]
        self.seen[f"{name}.mean"], self.seen[f"{name}.logvar"] = mean[0], logvar[0]
        self.seen[f"{name}.latent"] = latent
        tokens = patchify(latent, self.p)
        grid = latent.shape[1] // self.p, latent.shape[2] // self.p
        inputs = torch.cat([self.bagel.latent_tokens(tokens, 0.0, *grid), self.marks()])
        self.seen[f"{name}.embed"] = as_published(inputs, len(tokens))
        self.run(self.main, inputs, name, lead=len(tokens))

    def look(self, pixels: Tensor, n: int, name: str) -> None:
        patch = self.bagel.config.vit.patch_size
        patches = patchify(pixels, patch).to(self.device, self.bagel.latents.vae2llm.weight.dtype)
        grid = pixels.shape[1] // patch, pixels.shape[2] // patch
        if self.watch:
            features = self.bagel.vit(patches, [grid])
            self.seen[f"vit{n}.features"] = features
            self.seen[f"vit{n}.connector"] = self.bagel.connector(features)
        start, end = self.marks()
        tokens = self.bagel.image_tokens(patches, [grid])
        self.run(self.main, torch.cat([start[None], tokens, end[None]]), name)

    # -- outputs -----------------------------------------------------------------------------

    def write(self, branch: Branch, limit: int) -> str:
        """Greedy text after a context, which it leaves as it is."""
        branch = branch.fork()
        ids, logits = [self.tokenizer.start], []
        while len(ids) <= limit and self.tokenizer.end not in ids:
            hidden = self.run(branch, self.ids(ids[-1:]), causal=True)
            logits.append(self.decoder.logits(hidden)[0])
            ids.append(int(logits[-1].argmax()))
        self.seen["argmax_tokens"] = torch.tensor(ids[1:])
        self.seen["step_logits"] = torch.stack(logits[:4])
        self.returned = [token for token in ids[1:limit] if token != self.tokenizer.end]
        return self.tokenizer.answer(self.returned)

    def draw(self, height: int, width: int, params: dict, *, every: bool = False) -> Tensor:
        """An image as bytes `[height, width, 3]`.

        Args:
            every: compute all branches in every step, also those that make no difference.
        """
        params = {**DEFAULTS, **params}
        unit = self.bagel.config.latent_downsample
        grid = height // unit, width // unit
        strong = Guidance(
            params["cfg_text_scale"],
            params["cfg_img_scale"],
            params["cfg_renorm_type"],
            params["cfg_renorm_min"],
        )
        names = ("main", "cfg_text", "cfg_img")
        branches = dict(zip(names, (self.main, self.no_text, self.no_image), strict=True))
        seers = {name: TaylorSeer() for name in names} if params["enable_taylorseer"] else {}
        steps = flow_steps(
            params["num_timesteps"], params["timestep_shift"], params["cfg_interval"]
        )
        size = grid[0] * grid[1], self.bagel.config.patch_latent_dim
        x = torch.randn(size, generator=self.generator).to(self.device)
        trajectory, self.scales = [], []
        self.seen["noise"] = x
        for index, step in enumerate(steps):
            guidance = strong if step.guided else Guidance()
            self.scales.append([guidance.text_scale, guidance.image_scale])
            inputs = torch.cat([self.bagel.latent_tokens(x, step.t, *grid), self.marks()])
            v = {}
            for name in (
                "main",
                *["cfg_text"] * (every or guidance.by_text),
                *["cfg_img"] * (every or guidance.by_image),
            ):
                noted = "step0" if index == 0 and name == "main" else None
                seer = seers.get(name)
                if seer is None or seer.is_due:
                    hidden = self.run(branches[name], inputs, noted, keep=False, lead=len(x))
                    hidden = hidden[: len(x)] if seer is None else seer.observe(hidden[: len(x)])
                else:
                    hidden = seer.predict()
                v[name] = self.bagel.velocity(hidden)
                if index == 0:
                    self.seen[f"step0.v_{name}"] = v[name]
            mixed = guided_velocity(*(v.get(name, v["main"])[None] for name in names), [guidance])[
                0
            ]
            if index == 0:
                self.seen["step0.v"] = mixed
            x = x - mixed * step.dt
            trajectory.append(x)
        self.seen["latents"] = torch.stack(trajectory)
        latent = unpatchify(x, *grid, self.p)
        pixels = self.autoencoder.decode(latent[None])[0]
        self.seen["decoder_in"], self.seen["decoder_out"] = latent, pixels
        self.seen["image"] = to_uint8(pixels)
        return self.seen["image"]

    # -- whole requests ----------------------------------------------------------------------

    def answer(self, case: dict, images: dict[str, Image.Image]) -> str:
        """A case of the goldens that gives text."""
        self.begin()
        if case["think"]:
            self.think_first(THINK_THEN_ANSWER)
        if case["image"]:
            self.image(images[case["image"]], draw=False)
        self.prompt = self.text(case["text"])
        return self.write(self.main, case["max_think_token_n"])

    def paint(self, case: dict, images: dict[str, Image.Image]) -> Tensor:
        """A case of the goldens that gives an image."""
        self.begin(case["seed"])
        params = case["params"]
        self.size = tuple(params["image_shapes"]) if "image_shapes" in params else None
        if params.get("think"):
            self.think_first(THINK_THEN_DRAW)
        given = case.get("input_list") or [case["image"], case["text"]]
        for item in given:
            if item in images:
                self.image(images[item], draw=True)
            elif item is not None:
                self.text(item)
        if params.get("think"):
            self.thought = self.write(self.main, case["max_think_token_n"])
            self.reread = self.feed(self.main, self.thought)
        return self.draw(*self.size, params)


def as_published(rows: Tensor, lead: int) -> Tensor:
    """Rows in the order of the goldens: start of image, latents, end of image."""
    if not lead:
        return rows
    return torch.cat([rows[lead : lead + 1], rows[:lead], rows[lead + 1 :]])


def guided_velocity(main: Tensor, text: Tensor, image: Tensor, guidance: list[Guidance]) -> Tensor:
    """Velocities float32 `[requests, tokens, dim]` of images of one size.

    Args:
        main: with everything, `[requests, tokens, dim]`.
        text: without text, of the same shape; `main` again where that is not needed.
        image: without images; `main` again where that is not needed, or where there are none.
    """
    places = torch.arange(3 * len(main), dtype=torch.int32, device=main.device).view(3, -1)
    table = guidance_table(guidance, [-1.0] * len(main), main.device)
    still = torch.zeros_like(main, dtype=torch.float32)
    return guided_euler(still, torch.cat([main, text, image]), places, table)
