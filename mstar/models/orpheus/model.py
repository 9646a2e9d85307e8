"""Orpheus: text to speech. A Llama writes audio tokens, the SNAC codec makes them heard."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mstar.engine.channel import Channel
from mstar.engine.checkpoint import Checkpoint
from mstar.engine.kvcache import KVPool
from mstar.engine.lm import LanguageModel
from mstar.engine.memory import kv_tokens_for
from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.engine.runtime import Task
from mstar.engine.sampling import SamplingParams, mix
from mstar.engine.traps import Call, spawn
from mstar.engine.weights import load, randomize
from mstar.errors import InvalidRequest, WeightsError
from mstar.models.base import Inputs, Model, Setup
from mstar.models.orpheus.codec import CodecJob, codec_runner
from mstar.models.orpheus.frames import FrameBuffer
from mstar.models.orpheus.llama import Llama, LlamaConfig
from mstar.models.orpheus.noise import window_noise
from mstar.models.orpheus.prompt import STOP, load_tokenizer, prompt_ids, split_sentences
from mstar.models.orpheus.snac import SnacConfig, SnacDecoder
from mstar.models.orpheus.windows import Window, WindowPlan

__all__ = ["Orpheus"]

# Utterances of one long text that are spoken at the same time.
_ABREAST = 8
# Frames per codec call: one at a time for those who listen along, more for those who wait.
_CHUNK_STREAMED, _CHUNK_WHOLE = 1, 16


@dataclass(frozen=True)
class _Plan:
    """A request, laid out: the prompt of each utterance."""

    prompts: list[list[int]]
    seed: int


class Orpheus(Model):
    """Nodes `lm` and `snac`."""

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
        self.snac = Node(
            "snac",
            codec_runner(snac, lm.device),
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
        try:
            config = LlamaConfig.from_file(folders["lm"] / "config.json")
            codec = SnacConfig.from_file(folders["snac"] / "config.json")
        except FileNotFoundError as error:
            raise WeightsError(f"there is no {error.filename}") from error
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"cannot use the config.json of orpheus: {error}") from error
        with torch.device("meta"):
            network, snac = Llama(config), SnacDecoder(codec)
        for part, module, dtype in (("lm", network, setup.dtype), ("snac", snac, torch.float32)):
            if setup.dummy:
                randomize(module, device=setup.device, dtype=dtype)
            else:
                load(
                    module,
                    Checkpoint.open(folders[part]),
                    device=setup.device,
                    dtype=dtype,
                    progress=setup.progress,
                )
        tokens = setup.kv_tokens or kv_tokens_for(
            network.kv_layout,
            setup.device,
            setup.dtype,
            fraction=setup.memory_fraction,
            at_most=max(setup.max_batch * 8192, 65536),
        )
        pool = KVPool(
            network.kv_layout,
            tokens,
            device=setup.device,
            dtype=setup.dtype,
            prefix_cache=setup.prefix_cache,
        )
        lm = LanguageModel(
            "lm",
            network,
            pool,
            max_batch=setup.max_batch,
            token_budget=setup.token_budget,
            look_ahead=setup.look_ahead,
        )
        return cls(lm, snac, load_tokenizer(folders["lm"]), config.max_position_embeddings)

    @property
    def nodes(self) -> Sequence[Node]:
        """See `Model.nodes`."""
        return (self.lm, self.snac)

    def prepare(self, inputs: Inputs, params: dict[str, Any], outputs: tuple[str, ...]) -> _Plan:
        """See `Model.prepare`."""
        if inputs.text is None:
            raise InvalidRequest("text", None, "orpheus needs the text to speak")
        texts = split_sentences(inputs.text) if params["split_text"] else [inputs.text]
        prompts = [prompt_ids(self.encode, text, params["voice"]) for text in texts]
        most = max(map(len, prompts)) + params["max_output_tokens"]
        if most > self.longest:
            raise InvalidRequest(
                "max_output_tokens",
                params["max_output_tokens"],
                f"with the prompt this makes {most} tokens, and the model takes {self.longest}",
            )
        self.lm.pool.check_fits("max_output_tokens", params["max_output_tokens"], most)
        seed = params["seed"]
        return _Plan(prompts, secrets.randbits(63) if seed is None else seed)

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
            async for call in channel:
                request.emit_audio(call, rate)
        return "length" if "length" in [await task for task in tasks] else "stop"

    async def _speak_into(self, channel: Channel, request: Request, index: int) -> str:
        reason = await _Speech(self, request, index, channel.send).speak()
        channel.close()
        return reason

    def warmup(self) -> None:
        """See `Model.warmup`."""
        self.lm.warmup()


class _Speech:
    """One utterance: tokens to frames to windows to calls of the codec, which go to `send`."""

    def __init__(
        self, model: Orpheus, request: Request, index: int, send: Callable[[Call], None]
    ) -> None:
        plan: _Plan = request.inputs
        params = request.params
        self.model = model
        self.request = request
        self.prompt = plan.prompts[index]
        self.seed = mix(plan.seed + index)
        self.send = send
        self.frames = FrameBuffer()
        self.windows = WindowPlan(
            model.codec.context_frames,
            params["lookahead"],
            _CHUNK_STREAMED if request.stream else _CHUNK_WHOLE,
        )
        self.noisy = params["codec_noise"] == "seeded" and model.codec.noise
        self.joined_before = index > 0
        self.joined_after = index + 1 < len(plan.prompts)

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
        for window in self.windows.ready(self.frames.count, ended=ended):
            self.send(self.model.snac(self._job(window, ended)))

    def _job(self, window: Window, ended: bool) -> CodecJob:
        noise = None
        if self.noisy:
            lengths = self.model.codec.noise_lengths(1)
            noise = window_noise(self.seed, window.low, window.high, lengths)
        return CodecJob(
            self.frames.codes(window.low, window.high),
            noise,
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
            max_tokens=params["max_output_tokens"],
            min_tokens=params["min_tokens"],
            stop_ids=frozenset(stop),
            seed=self.seed,
        )
