"""Orpheus: text to speech. A Llama writes audio tokens, the SNAC codec makes them heard."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mstar.engine.captured import record
from mstar.engine.channel import Channel
from mstar.engine.checkpoint import Checkpoint
from mstar.engine.lm import LanguageModel
from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.engine.runtime import Task
from mstar.engine.sampling import SamplingParams, mix
from mstar.engine.traps import Call, spawn
from mstar.errors import ContextTooLong, InvalidRequest
from mstar.models.base import Inputs, Model, Setup, filled
from mstar.models.orpheus.card import MOST_TOKENS
from mstar.models.orpheus.codec import Codec, CodecJob
from mstar.models.orpheus.frames import FrameBuffer
from mstar.models.orpheus.networks import networks
from mstar.models.orpheus.prompt import (
    MOST_TEXT,
    STOP,
    load_tokenizer,
    prompt_ids,
    split_sentences,
    spoken,
)
from mstar.models.orpheus.snac import SnacDecoder
from mstar.models.orpheus.windows import Window, WindowPlan
from mstar.models.parameters import demand

__all__ = ["Orpheus"]

# Utterances of one long text that are spoken at the same time.
_ABREAST = 8
# Frames per codec call: one at a time for those who listen along, more for those who wait.
_CHUNK_STREAMED, _CHUNK_WHOLE = 1, 16
_WARM_FRAMES = 12
# Heard frames of a captured batch: in larger ones the GPU is busy for longer, and their memory
# would be kept for good.
_CAPTURED_FRAMES = 64


@dataclass(frozen=True)
class _Plan:
    """A request, laid out: the prompt of each utterance, and the most tokens that may follow."""

    prompts: list[list[int]]
    limits: list[int]
    seed: int


class Orpheus(Model):
    """Nodes `lm` and `snac`."""

    quantized = r"^model\.layers\.\d+\.(self_attn|mlp)\."

    def __init__(
        self,
        lm: LanguageModel,
        snac: SnacDecoder,
        encode: Callable[[str], list[int]],
        longest: int,
    ) -> None:
        self.lm = lm
        self.longest = longest
        self.codec = snac.config
        self.sample_rate = snac.config.sampling_rate
        self.networks = (lm.network, snac)
        self.encode = encode
        self.decoder = Codec(snac, lm.device, record() if lm.device.type == "cuda" else None)
        self.snac = Node(
            "snac",
            self.decoder.run,
            key=lambda job: job.shape,
            max_batch=lm.max_batch,
            cost=lambda job: job.cost,
            max_cost=512,
            beside=True,
        )

    @classmethod
    def load(cls, setup: Setup) -> Orpheus:
        """See `Model.load`. The decoder runs in `setup.dtype`, the codec always in float32."""
        folders = setup.folders
        network, snac = networks(folders)
        encode = load_tokenizer(folders["lm"])
        filled(network, lambda: Checkpoint.open(folders["lm"]), **setup.filling)
        how = {**setup.filling, "dtype": torch.float32}
        filled(snac, lambda: Checkpoint.open(folders["snac"]), **how)
        lm = setup.language_model("lm", network)
        return cls(lm, snac, encode, network.config.max_position_embeddings)

    @property
    def nodes(self) -> Sequence[Node]:
        """See `Model.nodes`."""
        return (self.lm, self.snac)

    def prepare(self, inputs: Inputs, params: dict[str, Any], outputs: tuple[str, ...]) -> _Plan:
        """See `Model.prepare`."""
        demand(inputs.text is not None, "text", None, "orpheus needs the text to speak")
        text, voice = inputs.text, spoken("voice", params["voice"])
        allowed = f"has {len(text)} characters; one request speaks at most {MOST_TEXT}"
        demand(len(text) <= MOST_TEXT, "text", text, allowed)
        text = spoken("text", text)
        texts = split_sentences(text) if params["split_text"] else [text]
        prompts = [prompt_ids(self.encode, text, voice) for text in texts]
        limits = [
            self._limit(text, len(prompt), params)
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        seed = params["seed"]
        return _Plan(prompts, limits, secrets.randbits(63) if seed is None else seed)

    def _limit(self, text: str, prompt: int, params: dict[str, Any]) -> int:
        """The most tokens after a prompt of `prompt` tokens: as many as were asked for, or else as
        there is room for.

        Raises:
            InvalidRequest: there is no room for what was asked.
        """
        self._check_fits("text", text, prompt + 1, ContextTooLong)
        for field in ("max_output_tokens", "min_tokens"):
            if params[field] is not None:
                self._check_fits(field, params[field], prompt + params[field])
        if params["max_output_tokens"] is not None:
            return params["max_output_tokens"]
        return min(MOST_TOKENS, min(self.longest, self.lm.pool.capacity) - prompt)

    def _check_fits(
        self, field: str, value: Any, tokens: int, error: type[InvalidRequest] = InvalidRequest
    ) -> None:
        if tokens > self.longest:
            allowed = f"the request may need {tokens} tokens, and the model takes {self.longest}"
            raise error(field, value, allowed)
        self.lm.pool.check_fits(field, value, tokens, error)

    async def walk(self, request: Request) -> str:
        """Speak the utterances abreast, deliver them one after another."""
        plan: _Plan = request.inputs
        rate = self.sample_rate
        if len(plan.prompts) == 1:
            speech = _Speech(self, request, 0, lambda call: request.emit_audio(call, rate))
            return await speech.speak()
        channels = [Channel() for _ in plan.prompts]
        tasks: list[Task] = []
        for index, channel in enumerate(channels):
            for ahead in range(len(tasks), min(index + _ABREAST, len(channels))):
                tasks.append(spawn(self._speak_into(channels[ahead], request, ahead)))
            async for sound in channel:
                request.emit_audio(await sound, rate)
        return "length" if "length" in [await task for task in tasks] else "stop"

    async def _speak_into(self, channel: Channel, request: Request, index: int) -> str:
        """One of several utterances: the codec is at work for it before it is its turn."""
        sounds: list[Awaitable[np.ndarray]] = []

        def send(call: Call) -> None:
            sounds.append(spawn(_result_of(call)))
            channel.send(sounds[-1])

        reason = await _Speech(self, request, index, send).speak()
        channel.close()
        for sound in sounds:  # they would end with this walk
            await sound
        return reason

    def warmup(self) -> None:
        """See `Model.warmup`. The codec runs as for a window, whatever the decoder would say."""
        self.lm.warmup()
        for seed in (None, 0) if self.codec.noise else (None,):
            self.snac.run([CodecJob([0] * 7 * _WARM_FRAMES, 0, _WARM_FRAMES, seed, (0, 1))])
        for chunk in (_CHUNK_WHOLE, _CHUNK_STREAMED):
            self.decoder.capture(chunk, min(self.snac.max_batch, _CAPTURED_FRAMES // chunk))

    def examples(self) -> Sequence[Mapping[str, Any]]:
        """See `Model.examples`."""
        return [{"text": "Hello.", "seed": 0, "max_output_tokens": 7 * _WARM_FRAMES}]


class _Speech:
    """One utterance: tokens to frames to windows to calls of the codec, which go to `send`."""

    def __init__(
        self, model: Orpheus, request: Request, index: int, send: Callable[[Call], None]
    ) -> None:
        plan: _Plan = request.inputs
        params = request.params
        self.model = model
        self.request = request
        self.prompt, self.limit = plan.prompts[index], plan.limits[index]
        self.seed = mix(plan.seed + index)
        self.send = send
        self.frames = FrameBuffer()
        self.noisy = params["codec_noise"] == "seeded" and model.codec.noise
        self.joined_before = index > 0
        self.joined_after = index + 1 < len(plan.prompts)
        self.windows = WindowPlan(
            model.codec.context_frames,
            # The last frame fades out, so it must not be heard before it is known as such.
            max(params["lookahead"], int(self.joined_after)),
            _CHUNK_STREAMED if request.stream else _CHUNK_WHOLE,
        )

    async def speak(self) -> str:
        """Decode to the end; returns the finish reason."""
        lm = self.model.lm
        with lm.open_cache() as kv:
            tokens = lm.generate(kv, self.prompt, self._sampling(), usage=self.request.usage)
            async for token in tokens:
                if self.frames.push(token):
                    self._hear(ended=False)
        self._hear(ended=True)
        return tokens.finish_reason

    def _hear(self, *, ended: bool) -> None:
        usage = self.request.usage
        usage.speech_tokens = usage.generated_tokens  # there are no others
        for window in self.windows.ready(self.frames.count, ended=ended):
            self.send(self.model.snac(self._job(window, ended)))

    def _job(self, window: Window, ended: bool) -> CodecJob:
        return CodecJob(
            self.frames.codes(window.low, window.high),
            window.low,
            window.high,
            self.seed if self.noisy else None,
            (window.start - window.low, window.end - window.low),
            fade_in=self.joined_before and window.start == 0,
            fade_out=self.joined_after and ended and window.end == self.frames.count,
        )

    def _sampling(self) -> SamplingParams:
        params = self.request.params
        stop = set(params["stop"] or ())
        if not params["ignore_eos"]:
            stop.add(STOP)
        return SamplingParams(
            temperature=params["temperature"],
            top_k=params["top_k"],
            top_p=params["top_p"],
            min_p=params["min_p"],
            repetition_penalty=params["repetition_penalty"],
            presence_penalty=params["presence_penalty"],
            frequency_penalty=params["frequency_penalty"],
            logit_bias=params["logit_bias"] or {},
            max_tokens=self.limit,
            min_tokens=params["min_tokens"],
            stop_ids=frozenset(stop),
            seed=self.seed,
        )


async def _result_of(call: Call) -> np.ndarray:
    return await call
