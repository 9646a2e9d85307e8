"""BAGEL: chats, sees, draws, edits. One decoder reads, writes and predicts the flow of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mstar.engine.captured import record
from mstar.engine.content import media_content
from mstar.engine.feature_cache import FeatureCache
from mstar.engine.kernels.staging import to_device
from mstar.engine.kvcache import KVCache
from mstar.engine.lm import LanguageModel
from mstar.engine.node import Node
from mstar.engine.prefill import prefill
from mstar.engine.request import Request
from mstar.errors import ContextTooLong, WeightsError
from mstar.models.bagel.autoencoder import Autoencoder
from mstar.models.bagel.card import MOST_TOKENS
from mstar.models.bagel.contexts import Context, Contexts, Mark, Medium
from mstar.models.bagel.drawing import Easel
from mstar.models.bagel.flow import Flow
from mstar.models.bagel.networks import Bagel as Networks
from mstar.models.bagel.networks import load_networks
from mstar.models.bagel.pictures import Picture
from mstar.models.bagel.pixels import patchify
from mstar.models.bagel.plan import Plan, Planner
from mstar.models.bagel.prompt import THINK_THEN_ANSWER, THINK_THEN_DRAW, Tokenizer
from mstar.models.bagel.runners import decode_runner, encode_runner, vision_runner
from mstar.models.bagel.stepping import Stepper
from mstar.models.base import Inputs, Model, Setup
from mstar.models.parameters import demand
from mstar.models.text import TextGeneration, sampling_params

__all__ = ["Bagel"]

# Most drafts of the largest image in one batch of the decoder.
_DRAFTS = 8
# Most tokens of a step of the flow on a CPU, so that layers leave each other their results in its
# cache (measured on an AMD EPYC: 2,064 tokens take 1.1 times as long as twice 1,032).
_CPU_TOKENS = 1200
_FEATURES = 256 << 20  # bytes of encoded images that are kept


class Bagel(Model):
    """Nodes `lm`, `vision`, `encode`, `flow` and `decode`."""

    quantized = r"layers\.\d+\.(und|gen)\.(self_attn|mlp)\."

    def __init__(
        self, bagel: Networks, autoencoder: Autoencoder, lm: LanguageModel, tokenizer: Tokenizer
    ) -> None:
        self.bagel, self.autoencoder = bagel, autoencoder
        self.networks = (bagel, autoencoder)
        self.config = bagel.config
        self.lm = lm
        self.tokenizer = tokenizer
        self.planner = Planner(self.config, tokenizer, bagel.side, lm.device)
        self.features = FeatureCache(_FEATURES)
        marks = torch.tensor([tokenizer.image_start, tokenizer.image_end], device=lm.device)
        self.marks = bagel.decoder.embed(marks)
        self.vision = Node(
            "vision",
            vision_runner(bagel, lm.device),
            cost=lambda picture: len(picture.patches),
            max_cost=2 * self.config.vit.positions,
        )
        self.encode = Node(
            "encode",
            encode_runner(autoencoder, lm.device),
            key=lambda picture: picture.size,
            max_batch=4,
        )
        on_gpu = lm.device.type == "cuda"
        stepper = Stepper(bagel, lm.pool, self.marks, record() if on_gpu else None)
        self.flow = Flow(stepper, budget=lm.span_budget if on_gpu else _CPU_TOKENS)
        self.decode = Node(
            "decode",
            decode_runner(autoencoder, self.config.latent_patch_size),
            key=lambda image: image.grid,
            # A CPU takes longer over several at a time: their pixels leave its cache.
            max_batch=4 if on_gpu else 1,
            beside=on_gpu,
        )

    @classmethod
    def load(cls, setup: Setup) -> Bagel:
        """See `Model.load`. The autoencoder always runs in float32."""
        folder = setup.folders["bagel"]
        tokenizer = Tokenizer(folder)
        bagel, autoencoder = load_networks(folder, **setup.filling)
        ids, known = tokenizer.size, bagel.decoder.vocab_size
        if ids > known:
            raise WeightsError(f"{folder}: the tokenizer has {ids} ids, the decoder knows {known}")
        budget = _DRAFTS * (bagel.side**2 + 2)
        lm = setup.language_model("lm", bagel.decoder, span_budget=budget)
        return cls(bagel, autoencoder, lm, tokenizer)

    @property
    def nodes(self) -> Sequence[Node]:
        return (self.lm, self.vision, self.encode, self.flow, self.decode)

    def warmup(self) -> None:
        self.lm.warmup()
        side = self.planner.usual // self.config.latent_downsample
        self.flow.warmup((side, side))

    def examples(self) -> Sequence[Mapping[str, Any]]:
        """See `Model.examples`."""
        image = Image.new("RGB", (100, 80))
        asked = {"text": "Hello.", "images": image, "seed": 0}
        drawn = {"output_modalities": ("image",), "num_timesteps": 3, "cfg_img_scale": 2.0}
        return [{**asked, "max_output_tokens": 4, "ignore_eos": True}, {**asked, **drawn}]

    def prepare(self, inputs: Inputs, params: dict[str, Any], outputs: tuple[str, ...]) -> Plan:
        plan = self.planner.plan(inputs, params, outputs)
        self._fill(plan)
        end = plan.contexts.main.end
        room = self._room(end)
        shown = f"a prompt of {end.length} tokens"
        if end.position + 1 >= self.config.llm.max_position_embeddings:
            longest = self.config.llm.max_position_embeddings
            raise ContextTooLong("text", f"{end.position} positions", f"the model takes {longest}")
        pool, allowed = self.lm.pool, f"there is room for {room} after the prompt"
        if plan.drawing is None:
            pool.check_fits("text", shown, end.length + 1, ContextTooLong)
            most = params["max_output_tokens"]
            demand(most is None or most <= room, "max_output_tokens", most, allowed)
            return plan
        most = params["max_think_tokens"]
        thought = most + 2 if plan.think else 0
        demand(thought <= room or not plan.think, "max_think_tokens", most, allowed)
        shown = f"{shown} and an image of {plan.drawing.tokens}"
        needed = self._held(plan, end.length + thought) + self._drafts(plan)
        pool.check_fits("text", shown, needed, ContextTooLong)
        return plan

    def _room(self, end: Mark) -> int:
        """Tokens that may follow a prompt."""
        longest = self.config.llm.max_position_embeddings
        return min(longest - end.position, self.lm.pool.capacity - end.length) - 1

    def _held(self, plan: Plan, main: int) -> int:
        """Tokens of KV cache that the contexts of a drawing take; the main one has `main`."""
        contexts, page = plan.contexts, self.lm.pool.page_size
        images_apart = contexts.has_images and plan.branches == 3
        beside = contexts.without_images.end.length if images_apart else 0
        negative = len(plan.drawing.negative or ())
        return main + beside + negative + 3 * page

    def _drafts(self, plan: Plan) -> int:
        """Tokens of KV cache that one image takes while it is drawn."""
        return plan.branches * (plan.drawing.tokens + 2 * self.lm.pool.page_size)

    def _fill(self, plan: Plan) -> None:
        contexts = plan.contexts
        if plan.think:
            system = THINK_THEN_ANSWER if plan.drawing is None else THINK_THEN_DRAW
            contexts.system(self.tokenizer.text_span(system))
        eps = iter(plan.eps)
        for element in plan.elements:
            if not isinstance(element, Picture):
                contexts.text(element)
            elif plan.drawing is None:
                contexts.image(self._seen(element))
            else:
                contexts.image(self._encoded(element, next(eps)), self._seen(element))

    async def _features(self, picture: Picture, kind: str) -> Sequence[Tensor]:
        """What an encoder makes of a picture, from the cache if it is there."""
        found = self.features.get((kind, picture.key))
        if found is None:
            found = await (self.vision if kind == "vision" else self.encode)(picture)
            self.features.put((kind, picture.key), *found)
        return found

    def _seen(self, picture: Picture) -> Medium:
        """A picture as the vision encoder sees it."""
        content = media_content(picture.key, len(picture.patches) + 2, "vision")

        async def embed() -> Tensor:
            return torch.cat([*await self._features(picture, "vision"), self.marks])

        return Medium(content, embed)

    def _encoded(self, picture: Picture, eps: Tensor) -> Medium:
        """A picture as the autoencoder encodes it, with its noise."""
        rows, columns = (side // self.config.latent_downsample for side in picture.size)
        count = rows * columns
        content = media_content(picture.key + eps.numpy().tobytes(), count + 2, "latents")

        async def embed() -> Tensor:
            mean, logvar = await self._features(picture, "latents")
            noise = to_device(eps[0].numpy(), torch.float32, mean.device)
            latent = self.autoencoder.latent(mean, logvar, noise)
            latents = patchify(latent, self.config.latent_patch_size)
            return torch.cat([self.bagel.latent_tokens(latents, 0.0, rows, columns), self.marks])

        return Medium(content, embed, count)

    async def walk(self, request: Request) -> str | None:
        plan: Plan = request.inputs
        contexts, usage = plan.contexts, request.usage
        usage.image_tokens += sum(
            len(span.content) for span in contexts.main.spans if span.embed is not None
        )
        with ExitStack() as stack:
            main = stack.enter_context(self.lm.open_cache())
            aside = stack.enter_context(main.fork())  # empty still: for the context without images
            await prefill(self.lm, main, contexts.main.spans, usage)
            contexts.main.end.place(main)
            if plan.drawing is None:
                return await self._write(request, plan, main, contexts.main.end)
            if not contexts.has_images:  # then it is the beginning of the main one
                contexts.without_images.end.place(aside := stack.enter_context(main.fork()))
            elif plan.branches == 3:
                await prefill(self.lm, aside, contexts.without_images.spans)
                contexts.without_images.end.place(aside)
            if plan.think:
                await self._think(request, plan, contexts, main)
            away = stack.enter_context(main.fork())
            await self._without_text(away, contexts.without_text, plan)
            branches = main, away, aside if plan.is_apart else None
            left = self.lm.pool.capacity - self._held(plan, main.length)
            # More than go together would only come later, and take pages that others need.
            together = self.flow.budget // (plan.branches * plan.drawing.tokens)
            abreast = max(1, min(left // self._drafts(plan), together))
            await Easel(self.flow, self.decode, request, plan, branches).draw_all(abreast)
        return "stop"

    async def _write(self, request: Request, plan: Plan, kv: KVCache, end: Mark) -> str | None:
        params = request.params
        limit = params["max_output_tokens"] or min(MOST_TOKENS, self._room(end))
        text = self._generation(request, plan, kv, limit, params["stop"] or ())
        await text.emit(request)
        return text.finish_reason

    async def _think(self, request: Request, plan: Plan, contexts: Contexts, main: KVCache) -> None:
        """Think on a copy of the context, and append what was thought, as text, to it."""
        stop = request.params["stop"] or ()
        with main.fork() as kv:
            limit = request.params["max_think_tokens"] - 1
            text = self._generation(request, plan, kv, limit, stop)
            await text.emit(request)
        plan.notes["thought"] = text.finish_reason
        span = self.tokenizer.text_span(self.tokenizer.answer(text.ids, stop))
        contexts.main.text(span)
        await prefill(self.lm, main, contexts.main.spans[-1:])
        contexts.main.end.place(main)

    def _generation(
        self, request: Request, plan: Plan, kv: KVCache, limit: int, stop: Sequence[str] = ()
    ) -> TextGeneration:
        tokenizer = self.tokenizer
        params = request.params
        sampling = sampling_params(
            {**params, "min_tokens": min(params["min_tokens"], limit)},
            max_tokens=limit,
            end_ids=(tokenizer.end, tokenizer.start),  # text after another start is not shown
            seed=plan.seed,
        )
        tokens = self.lm.generate(kv, [tokenizer.start], sampling, usage=request.usage)
        return TextGeneration(tokens, tokenizer.shown, stop)

    async def _without_text(self, kv: KVCache, mark: Mark, plan: Plan) -> None:
        """Roll a copy of the main context back, and append what is to be led away from."""
        mark.place(kv)
        if plan.drawing.negative is not None:
            context = Context(end=mark)
            context.text(plan.drawing.negative)
            await prefill(self.lm, kv, context.spans)
            context.end.place(kv)
