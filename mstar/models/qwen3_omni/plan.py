"""A request, checked and laid out: what the Thinker reads, and what the Talker will say."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mstar.engine.content import media_content
from mstar.engine.prefill import PromptSpan
from mstar.errors import InvalidRequest
from mstar.models.base import Inputs
from mstar.models.parameters import demand
from mstar.models.qwen3_omni.config import OmniConfig
from mstar.models.qwen3_omni.material import Material, Reader
from mstar.models.qwen3_omni.prompt import Segment, lay_out, next_position
from mstar.models.qwen3_omni.speech import UserRows, speaker_id, user_rows
from mstar.models.qwen3_omni.tokenizer import Tokenizer
from mstar.models.turns import Part, Turn, turns_of

__all__ = ["Place", "Plan", "Planner", "SpeechPlan"]

KINDS = ("text", "image", "audio", "video")


@dataclass(frozen=True)
class Place:
    """Where a medium of the user's is, of which the Talker is given hidden states.

    Args:
        first, last: its tokens in the prompt, `[first, last)`.
        key: hash of the prompt up to its end.
    """

    first: int
    last: int
    key: bytes


@dataclass(frozen=True, eq=False)
class SpeechPlan:
    """What is to be spoken, and how.

    Args:
        speaker: id of the voice.
        user: the part of the prompt that the Talker is given.
        media: the media in it, in order.
        aloud: ids of the text that is given, to be read aloud; `None` for an answer.
    """

    speaker: int
    user: UserRows
    media: list[Place]
    aloud: list[int] | None


@dataclass(frozen=True, eq=False)
class Plan:
    """What a walk needs to know.

    Args:
        ids: of the Thinker's prompt.
        spans: of it, with their positions; `None` where there is text alone.
        next_position: of the first token of the answer.
        image_tokens, audio_tokens: of the prompt, those of images and videos, and of sounds.
        seed: of everything that is drawn.
        text: what is read aloud; otherwise empty.
        speech: `None` where nothing is spoken.
    """

    ids: list[int]
    spans: list[PromptSpan] | None
    next_position: float
    image_tokens: int
    audio_tokens: int
    seed: int
    text: str
    speech: SpeechPlan | None


class Planner:
    """Makes plans, in the callers' threads.

    Args:
        embed: makes the Thinker's inputs of a medium.
        device: of the model.
    """

    def __init__(
        self,
        config: OmniConfig,
        tokenizer: Tokenizer,
        embed: Callable[[Material], Coroutine[Any, Any, Tensor]],
        device: torch.device,
    ) -> None:
        self.config = config
        self.device = device
        self.tokenizer = tokenizer
        self._embed = embed

    def plan(
        self,
        inputs: Inputs,
        params: dict[str, Any],
        outputs: tuple[str, ...],
        check: Callable[[str, list[Segment]], None],
    ) -> Plan:
        """Lay a request out.

        Args:
            check: refuses prompts that are too long; called with the field at fault, before much
                is computed.

        Raises:
            InvalidRequest: it cannot be served.
        """
        speaker = self._speaker(params["voice"], "audio" in outputs)
        turns = self._turns(inputs, params["system"])
        aloud = self._reads_aloud(inputs, params["read_aloud"], outputs)
        reader = Reader(self.config.thinker, params, self.device)
        media = [
            reader.read(part.kind, part.value)
            for turn in turns
            for part in turn.parts
            if part.kind != "text"
        ]
        segments = lay_out(
            turns,
            [medium.size for medium in media],
            self.tokenizer,
            self.config.thinker,
            enable_thinking=params["enable_thinking"],
        )
        check(_field(inputs, segments), segments)
        spans = self._spans(segments, media)
        ids = [token for segment in segments for token in segment.ids]
        pads = [token for part in segments if part.medium is not None for token in part.ids]
        sounds = pads.count(self.config.thinker.audio_token_id)
        speech = None
        if speaker is not None:
            given = self.tokenizer.encode(inputs.text) if aloud else None
            user = user_rows(segments, self.config)
            speech = SpeechPlan(speaker, user, _places(spans, user), given)
        return Plan(
            ids,
            spans if media else None,
            next_position(segments),
            len(pads) - sounds,
            sounds,
            secrets.randbits(63) if params["seed"] is None else params["seed"],
            inputs.text if aloud else "",
            speech,
        )

    def _speaker(self, voice: str, speaks: bool) -> int | None:
        """The id of the voice, if something is to be spoken; its name is always checked."""
        talker = self.config.talker
        if talker is None:
            allowed = "this model has no Talker, or was loaded without: text only"
            demand(not speaks, "output_modalities", "audio", allowed)
            return None
        found = speaker_id(talker, voice)
        return found if speaks else None

    def _turns(self, inputs: Inputs, system: str | None) -> list[Turn]:
        turns = turns_of(inputs, KINDS)
        rules = [part for turn in turns if turn.role == "system" for part in turn.parts]
        said = [part for turn in turns if turn.role != "system" for part in turn.parts]
        if system is not None:
            alone = all(turn.role != "system" for turn in turns)
            demand(alone, "system", system, "the messages have a system turn already")
            turns = [Turn("system", (Part("text", system),)), *turns]
        is_text = all(part.kind == "text" for part in rules)
        demand(is_text, "messages", "system", "a system turn holds text only")
        if not any(part.kind != "text" or part.value.strip() for part in said):
            if inputs.messages is None:
                raise InvalidRequest("text", inputs.text, "is empty")
            raise InvalidRequest("messages", inputs.messages, "hold neither text nor media")
        return turns

    def _reads_aloud(self, inputs: Inputs, asked: bool | None, outputs: tuple[str, ...]) -> bool:
        alone = inputs.text is not None and not (inputs.images or inputs.audio or inputs.video)
        demand(alone or not asked, "read_aloud", True, "goes with text=, and with no media")
        allowed = "goes with output_modalities=('audio',)"
        demand("audio" in outputs or not asked, "read_aloud", True, allowed)
        return (alone and "text" not in outputs) if asked is None else asked

    def _spans(self, segments: Sequence[Segment], media: Sequence[Material]) -> list[PromptSpan]:
        left, bands = iter(media), self.config.thinker.audio.num_mel_bins
        spans = []
        for segment in segments:
            if segment.medium is None:
                spans.append(PromptSpan(segment.ids, segment.positions))
                continue
            medium = next(left).ready(bands, segment.is_video)
            content = media_content(medium.key, len(segment.ids))

            def embed(medium: Material = medium) -> Coroutine[Any, Any, Tensor]:
                return self._embed(medium)

            spans.append(PromptSpan(content, segment.positions, embed))
        return spans


def _places(spans: Sequence[PromptSpan], user: UserRows) -> list[Place]:
    """The media among the user's turns."""
    taken = set(torch.tensor(user.rows, dtype=torch.int64)[user.is_medium].tolist())
    digest, found, last = hashlib.blake2b(digest_size=16), [], 0
    for span in spans:
        first, last = last, last + len(span.content)
        digest.update(np.asarray(span.content, dtype=np.int64).tobytes())
        if span.embed is not None and first in taken:
            found.append(Place(first, last, digest.digest()))
    return found


def _field(inputs: Inputs, segments: Sequence[Segment]) -> str:
    """The argument that most of a prompt comes from."""
    if inputs.messages is not None:
        return "messages"
    longest = max(segments, key=lambda segment: len(segment.ids)).medium
    if longest is None:
        return "text"
    if not hasattr(longest, "grid"):
        return "audio"
    return "images" if longest.seconds is None else "video"
