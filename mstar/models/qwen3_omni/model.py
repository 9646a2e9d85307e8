"""Qwen3-Omni: a Thinker that reads, looks, listens and writes; a Talker that says it aloud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mstar.engine.captured import record
from mstar.engine.channel import Channel
from mstar.engine.feature_cache import FeatureCache
from mstar.engine.kvcache import KVCache
from mstar.engine.layers.moe import warm_experts
from mstar.engine.lm import LanguageModel
from mstar.engine.node import Node
from mstar.engine.prefill import prefill_causal
from mstar.engine.request import Request
from mstar.engine.sampling import SamplerState
from mstar.engine.spans import Step
from mstar.engine.traps import gather, spawn
from mstar.errors import ContextTooLong, WeightsError
from mstar.models.base import Inputs, Model, Setup
from mstar.models.parameters import demand
from mstar.models.qwen3_omni.card import MOST_FRAMES, MOST_TOKENS
from mstar.models.qwen3_omni.frames import Frames
from mstar.models.qwen3_omni.material import Material
from mstar.models.qwen3_omni.networks import Networks, load_networks
from mstar.models.qwen3_omni.plan import Plan, Planner
from mstar.models.qwen3_omni.positions import offset_of
from mstar.models.qwen3_omni.prompt import Segment
from mstar.models.qwen3_omni.runners import VocoderRunner, audio_runner, vision_runner
from mstar.models.qwen3_omni.speaking import HiddenStates, Speech
from mstar.models.qwen3_omni.speech import Speaker
from mstar.models.qwen3_omni.template import check_template
from mstar.models.qwen3_omni.tokenizer import Tokenizer
from mstar.models.qwen3_omni.vocoder import SAMPLE_RATE
from mstar.models.text import TextGeneration, sampling_params

__all__ = ["Qwen3Omni"]

_FEATURES = 512 << 20  # bytes of encoded media, and of what the Talker hears of them, that are kept
_PATCHES = 16384  # of images and videos in a batch: those of one video of the usual size
_MEL_FRAMES = 30000  # of sounds in a batch: five minutes
_SHARE = 0.8  # of the memory for KV caches that the Thinker's takes beside the Talker's


class Qwen3Omni(Model):
    """Nodes `thinker`, `vision`, `audio`; and `talker` and `vocoder` if it speaks."""

    options = ("speech",)
    quantized = (
        r"^(thinker|talker|talker\.code_predictor)\.decoder\.layers\.\d+\."
        r"(self_attn\.|mlp\.(gate_up|down|shared_expert\.))"
    )

    def __init__(self, networks: Networks, tokenizer: Tokenizer, lms: Sequence[LanguageModel]):
        omni = self.omni = networks.omni
        self.config = omni.config
        self.tokenizer = tokenizer
        self.thinker = lms[0]
        self.features = FeatureCache(_FEATURES)
        device = self.thinker.device
        self.planner = Planner(self.config, tokenizer, self._embed, device)
        self.vision = Node(
            "vision",
            vision_runner(omni, device),
            cost=lambda medium: medium.visual.grid.patches,
            max_cost=_PATCHES,
        )
        self.audio = Node(
            "audio",
            audio_runner(omni, device),
            cost=lambda medium: medium.features.shape[1],
            max_cost=_MEL_FRAMES,
        )
        self.networks = [omni]
        self.speech: Speech | None = None
        if networks.vocoder is not None:
            self.sample_rate = SAMPLE_RATE
            self.networks.append(networks.vocoder)
            self.speech = self._speech(networks, lms[1])

    def _speech(self, networks: Networks, lm: LanguageModel) -> Speech:
        omni = networks.omni
        on_gpu = lm.device.type == "cuda"
        frames = Frames(omni, lm, record() if on_gpu else None)
        self.sounds = VocoderRunner(networks.vocoder, record() if on_gpu else None)
        sound = Node(
            "vocoder",
            self.sounds.run,
            key=lambda job: job.shape,
            max_batch=16,
            beside=True,
        )
        newline = self.tokenizer.encode("\n")[0]
        return Speech(
            omni,
            lm,
            frames,
            networks.vocoder,
            sound,
            Speaker(omni.thinker, omni.talker, self.config, newline),
        )

    @property
    def nodes(self) -> Sequence[Node]:
        """See `Model.nodes`."""
        speech = self.speech
        spoken = () if speech is None else (speech.lm, speech.sound)
        return (self.thinker, self.vision, self.audio, *spoken)

    @classmethod
    def load(cls, setup: Setup) -> Qwen3Omni:
        """See `Model.load`. The vocoder always runs in float32."""
        speech = setup.options.get("speech", True)
        demand(isinstance(speech, bool), "options", speech, "speech must be true or false")
        folder = setup.folders["qwen3_omni"]
        tokenizer = Tokenizer(folder)
        check_template(folder)
        networks = load_networks(folder, speech=speech, **setup.filling)
        omni = networks.omni
        if tokenizer.size > omni.thinker.vocab_size:
            raise WeightsError(
                f"{folder}: the tokenizer has {tokenizer.size} ids, and the decoder knows "
                f"{omni.thinker.vocab_size}"
            )
        fraction = setup.memory_fraction
        own = setup if omni.talker is None else replace(setup, memory_fraction=fraction * _SHARE)
        lms = [own.language_model("thinker", omni.thinker, fractions=True)]
        if omni.talker is not None:
            own = replace(setup, prefix_cache=False)
            lms.append(own.language_model("talker", omni.talker, graphs=False))  # but see `Frames`
        return cls(networks, tokenizer, lms)

    def warmup(self) -> None:
        """See `Model.warmup`."""
        decoders = [(self.omni.thinker, self.thinker)]
        if self.speech is not None:
            decoders.append((self.omni.talker, self.speech.lm))
        for network, lm in decoders:
            warm_experts(network, lm.span_budget)
            lm.warmup()
        if self.speech is not None:
            self.speech.frames.warmup()
            self.sounds.capture(self.speech.sound.max_batch)

    def examples(self) -> Sequence[Mapping[str, Any]]:
        """See `Model.examples`."""
        media = {"images": Image.new("RGB", (100, 80)), "audio": (np.zeros(8000, "f4"), 16000)}
        limits = {"max_output_tokens": 4, "talker_min_tokens": 8, "talker_max_tokens": 8}
        outputs = ("text",) if self.speech is None else ("text", "audio")
        asked = {"text": "Hello.", "seed": 0, "ignore_eos": True, **limits}
        return [{**asked, **media, "output_modalities": outputs}]

    # -- laying a request out ----------------------------------------------------------------

    def prepare(self, inputs: Inputs, params: dict[str, Any], outputs: tuple[str, ...]) -> Plan:
        """See `Model.prepare`."""
        plan = self.planner.plan(inputs, params, outputs, self._check_length)
        if not plan.text:
            self._check_room("", self._text_room(plan), params)
        if plan.speech is not None:
            room, rows = self._speech_room(plan), len(plan.speech.user.ids)
            if room < 1:
                allowed = f"the Talker's KV cache holds {self.speech.lm.pool.capacity} tokens"
                raise ContextTooLong("text", f"{rows} tokens of speech and text", allowed)
            self._check_room("talker_", room, params)
        if plan.text and len(plan.speech.aloud) >= (limit := self._frames(plan, params)):
            allowed = f"is {len(plan.speech.aloud)} tokens long, and speech has {limit} frames"
            raise ContextTooLong("text", inputs.text, allowed)
        return plan

    def _check_room(self, prefix: str, room: int, params: dict[str, Any]) -> None:
        most = "talker_max_tokens" if prefix else "max_output_tokens"
        for name in (most, f"{prefix}min_tokens"):
            allowed = f"there is room for {room} after the prompt"
            demand((params[name] or 0) <= room, name, params[name], allowed)

    def _check_length(self, field: str, segments: Sequence[Segment]) -> None:
        longest = self.config.thinker.text.max_position_embeddings
        tokens = sum(len(segment.ids) for segment in segments)
        shown = f"a prompt of {tokens} tokens"
        if tokens + 1 > longest:
            raise ContextTooLong(field, shown, f"the model takes {longest}")
        self.thinker.pool.check_fits(field, shown, tokens + 1, ContextTooLong)

    def _text_room(self, plan: Plan) -> int:
        longest = self.config.thinker.text.max_position_embeddings
        return min(longest, self.thinker.pool.capacity) - len(plan.ids)

    def _speech_room(self, plan: Plan) -> int:
        longest = self.config.talker.text.max_position_embeddings
        return min(longest, self.speech.lm.pool.capacity) - len(plan.speech.user.ids)

    def _frames(self, plan: Plan, params: dict[str, Any]) -> int:
        return params["talker_max_tokens"] or min(MOST_FRAMES, self._speech_room(plan))

    # -- the walk ----------------------------------------------------------------------------

    async def walk(self, request: Request) -> str | None:
        """Read and write; speak beside it."""
        plan: Plan = request.inputs
        if plan.text:
            return await self._read_aloud(request, plan)
        request.usage.image_tokens += plan.image_tokens
        request.usage.audio_tokens += plan.audio_tokens
        with self.thinker.open_cache() as kv:
            kv.offset = offset_of(plan.next_position, len(plan.ids))
            if plan.speech is None:
                text = self._generation(request, plan, kv, None)
                await text.emit(request)
                return text.finish_reason
            states, tokens = HiddenStates(self.omni, self.features, plan.speech), Channel()
            text = self._generation(request, plan, kv, states)
            speech = spawn(self._speak(request, plan, tokens, states))
            await self._write(request, plan, text, tokens)
        spoken = await speech
        return text.finish_reason if spoken == "stop" else spoken

    async def _read_aloud(self, request: Request, plan: Plan) -> str:
        """Speak the given text; the Thinker has nothing to do."""
        if "text" in request.output_modalities:
            request.emit_text(plan.text)
        tokens = Channel()
        for token in plan.speech.aloud:
            tokens.send(token)
        tokens.close()
        request.usage.prompt_tokens += len(plan.speech.user.ids)
        states = HiddenStates(self.omni, self.features, plan.speech)
        return await self._speak(request, plan, tokens, states)

    async def _write(
        self, request: Request, plan: Plan, text: TextGeneration, tokens: Channel
    ) -> None:
        """Give the text to the caller, if it is asked for, and its tokens to the Talker.

        Where strings may end the text, the Talker gets what is certain, and says none of them.
        """
        stop = request.params["stop"]
        # The last one before the limit is not spoken, as published.
        most, sent = max(self._tokens(plan, request.params) - 1, 1), 0

        def say(_: int | None = None) -> None:
            nonlocal sent
            ids = (text.shown_ids() if stop else text.ids)[:most]
            for token in ids[sent:]:
                tokens.send(token)
            sent = len(ids)

        shown = "text" in request.output_modalities
        await (text.emit(request, say) if shown else text.each(lambda piece: None, say))
        say()
        tokens.close()

    def _generation(
        self, request: Request, plan: Plan, kv: KVCache, states: HiddenStates | None
    ) -> TextGeneration:
        params, usage = request.params, request.usage
        sampling = sampling_params(
            params,
            max_tokens=self._tokens(plan, params),
            end_ids=(self.config.im_end_token_id,),
            seed=plan.seed,
        )

        async def feed(sampler: SamplerState) -> Step:
            most = None if states is None else states.most_reused
            return await prefill_causal(
                self.thinker,
                kv,
                plan.spans,
                sampler=sampler,
                usage=usage,
                most_reused=most,
                hear=None if most is None else states.hear,
            )

        own = None if plan.spans is None else feed
        tokens = self.thinker.generate(kv, plan.ids, sampling, usage=usage, feed=own)
        return TextGeneration(tokens, self.tokenizer.decode, params["stop"] or ())

    def _tokens(self, plan: Plan, params: dict[str, Any]) -> int:
        return params["max_output_tokens"] or min(MOST_TOKENS, self._text_room(plan))

    async def _speak(
        self, request: Request, plan: Plan, tokens: Channel, states: HiddenStates
    ) -> str:
        limit = self._frames(plan, request.params)
        return await self.speech.speak(request, plan.speech, plan.seed, limit, tokens, states)

    # -- media -------------------------------------------------------------------------------

    async def _embed(self, medium: Material) -> Tensor:
        """The Thinker's inputs `[tokens, (1 + deepstack) * hidden]` of a medium."""
        branches = []
        if medium.visual is not None:
            branches.append(self._encoded(self.vision, medium.visual.key, medium))
        if medium.sound is not None:
            branches.append(self._encoded(self.audio, medium.sound.key, medium))
        rows = await gather(*branches)
        if medium.sound is not None:
            rows[-1] = self.omni.thinker.wide(rows[-1])
        if medium.is_video is None:
            return rows[0]
        both = rows[0].new_empty(len(medium.is_video), rows[0].shape[1])
        is_video = medium.is_video.to(both.device)
        both[is_video], both[~is_video] = rows
        return both

    async def _encoded(self, node: Node, key: bytes, medium: Material) -> Tensor:
        found = self.features.get((node.name, key))
        if found is None:
            found = (await node(medium),)
            self.features.put((node.name, key), *found)
        return found[0]
