"""Speech as a pipeline: tokens of text -> the Talker's frames -> the vocoder's samples.

Each of the three is a walk of its own; channels join them. The Talker begins with the first token
and takes one more with every frame; the vocoder follows in chunks that grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mstar.engine.channel import Channel
from mstar.engine.feature_cache import FeatureCache
from mstar.engine.kernels.staging import to_device
from mstar.engine.kvcache import KVCache
from mstar.engine.lm import LanguageModel
from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.engine.sampling import SamplerState, SamplingParams, mix
from mstar.engine.spans import Span, Step
from mstar.engine.traps import spawn
from mstar.models.qwen3_omni.frames import Frame, FrameJob, Frames
from mstar.models.qwen3_omni.networks import Omni
from mstar.models.qwen3_omni.plan import SpeechPlan
from mstar.models.qwen3_omni.positions import offset_of
from mstar.models.qwen3_omni.runners import VocoderJob, chunk_sizes
from mstar.models.qwen3_omni.speech import OPENING, Speaker
from mstar.models.qwen3_omni.vocoder import SAMPLE_RATE, Vocoder

__all__ = ["HiddenStates", "Speech"]


def _talker_sampling(params: dict[str, Any], seed: int, limit: int, end: int) -> SamplingParams:
    """How the first codes are drawn; `end` is the code that ends the speech."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens")
    return SamplingParams(
        **{name: params[f"talker_{name}"] for name in names},
        max_tokens=limit,
        stop_ids=frozenset([end]),
        seed=mix(seed + 1),
    )


def _predictor_sampling(params: dict[str, Any], seed: int) -> SamplingParams:
    """How the other codes are drawn."""
    names = ("temperature", "top_p", "top_k")
    values = {name: params[f"code_predictor_{name}"] for name in names}
    if values["temperature"] is None:
        values["temperature"] = 1.0 if params["talker_temperature"] else 0.0
    return SamplingParams(**values, seed=mix(seed + 2))


class HiddenStates:
    """The Thinker's hidden states of the user's media, for the Talker.

    They are kept for the next request with the same beginning. Where they are not, the Thinker has
    to read the prompt again from there on.
    """

    def __init__(self, omni: Omni, kept: FeatureCache, plan: SpeechPlan) -> None:
        self._thinker = omni.thinker
        self._kept = kept
        self._media = plan.media
        self._found = [kept.get(("accepted", place.key)) for place in plan.media]
        self._heard: list[list[Tensor]] = [[] for _ in plan.media]

    @property
    def most_reused(self) -> int | None:
        """Tokens of the prompt that may come from the prefix cache; `None` for all."""
        missing = zip(self._media, self._found, strict=True)
        return next((place.first for place, found in missing if found is None), None)

    def hear(self, first: int, hidden: Tensor) -> None:
        """See `prefill_causal`."""
        for place, found, heard in zip(self._media, self._found, self._heard, strict=True):
            rows = hidden[max(place.first - first, 0) : max(place.last - first, 0)]
            if found is None and len(rows):
                heard.append(self._thinker.accepted(rows).clone())

    def rows(self) -> Tensor:
        """Those of all media, `[media tokens, hidden]`."""
        rows = []
        for place, found, heard in zip(self._media, self._found, self._heard, strict=True):
            if found is None:
                found = (torch.cat(heard),)
                self._kept.put(("accepted", place.key), *found)
            rows += found
        weight = self._thinker.embed_tokens.weight
        return torch.cat(rows) if rows else weight.new_empty(0, weight.shape[1])


@dataclass(frozen=True, eq=False)
class Speech:
    """What speaks.

    Args:
        lm: the Talker, as a language model of codes.
        frames: what it runs frames with.
        sound: node of the vocoder.
    """

    omni: Omni
    lm: LanguageModel
    frames: Frames
    vocoder: Vocoder
    sound: Node
    speaker: Speaker

    async def speak(
        self,
        request: Request,
        plan: SpeechPlan,
        seed: int,
        limit: int,
        tokens: Channel,
        states: HiddenStates,
    ) -> str:
        """Say the tokens of a text; nothing if there is none.

        With look-ahead, a frame is completed and the next one begun before it is known whether its
        first code was the end.

        Args:
            limit: most frames, the end counted.
            tokens: of the text, as they come.

        Returns:
            The finish reason.
        """
        first = await anext(tokens, None)
        if first is None:
            return "stop"
        end, params = self.omni.talker.config.codec_eos_token_id, request.params
        after = self.omni.config.tts_eos_token_id  # what is said when the text has ended
        frames = Channel()
        sound = spawn(self._hear(request, frames))
        codes = self.lm.sampler.open(_talker_sampling(params, seed, limit, end), ())
        others = self.frames.open(_predictor_sampling(params, seed))
        try:
            with self.lm.open_cache() as kv:
                step = await self._prefill(kv, plan, first, states, codes)
                for count in range(1, limit + 1):
                    ended = None if self.lm.look_ahead and count < limit else step.token == end
                    if ended or count == limit:  # the last one is not completed, as published
                        break
                    text = await anext(tokens, None)
                    if text is None:
                        text, after = after, self.omni.config.tts_pad_token_id
                    job = FrameJob(step, text, others, count - 1)
                    frame: Frame = await self.lm(Span(kv, job, 1, sampler=codes, hidden=True))
                    if ended is None and step.token == end:  # then this was for nothing
                        ended = True
                        break
                    frames.send(frame.codes)
                    request.usage.generated_tokens += 1
                    request.usage.speech_tokens += 1
                    step = frame.following
        finally:
            self.lm.sampler.close(codes)
        frames.close()
        await sound
        return "stop" if ended else "length"

    async def _prefill(
        self, kv: KVCache, plan: SpeechPlan, first: int, states: HiddenStates, sampler: SamplerState
    ) -> Step:
        """The user's turns and the opening; the step has the first code."""
        user, lm = plan.user, self.lm
        ids = to_device(user.ids[:-OPENING], torch.int64, lm.device)
        rows = self.speaker.user(user, self.omni.thinker.rows(ids), states.rows())
        inputs = torch.cat([rows, self.speaker.opening(plan.speaker, first)])
        kv.offset = offset_of(user.next_position, len(inputs))
        for start in range(0, len(inputs), lm.token_budget):
            rows = inputs[start : start + lm.token_budget]
            last = start + len(rows)
            step = await lm(
                Span(
                    kv,
                    rows,
                    len(rows),
                    user.positions[:, start:last],
                    sampler=sampler if last == len(inputs) else None,
                    hidden=last == len(inputs),
                )
            )
        step.hidden = step.hidden[-1:]
        return step

    async def _hear(self, request: Request, frames: Channel) -> None:
        """Frames to samples, chunk by chunk."""
        stream, held, sizes = self.vocoder.stream(), [], chunk_sizes()
        size = next(sizes)
        async for codes in frames:
            held.append(codes)
            if len(held) == size:
                request.emit_audio(await self.sound(VocoderJob(stream, held)), SAMPLE_RATE)
                held, size = [], next(sizes)
        if held:
            request.emit_audio(await self.sound(VocoderJob(stream, held)), SAMPLE_RATE)
