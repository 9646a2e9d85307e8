"""The shapes in which OpenAI writes a completion: envelope, choices, usage, probabilities."""

from __future__ import annotations

import hashlib
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import mstar
from mstar.types import Event, TextChunk, Usage

__all__ = ["Envelope", "ended", "image_part", "logprobs_of", "new_audio_id", "usage_of"]

_UNLIKELY = -9999.0  # what stands for any lower logarithm
_TIER = "default"


class Envelope:
    """What is the same in all chunks of one answer.

    Args:
        model: the name by which the model was called.
        card_name: its own.
    """

    def __init__(self, model: str, card_name: str) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        software = f"{mstar.__version__} {card_name}".encode()
        self._fingerprint = f"fp_{hashlib.sha256(software).hexdigest()[:12]}"

    def full(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """A whole completion."""
        return {**self._made("chat.completion", choices), "usage": usage}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A piece of one."""
        return self._made("chat.completion.chunk", choices)

    def _made(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "system_fingerprint": self._fingerprint,
            "service_tier": _TIER,
        }


def new_audio_id() -> str:
    """An id of sound that nobody can guess."""
    return f"audio_{uuid.uuid4().hex}"


def ended(reason: str | None) -> str:
    """The engine's reason for the end, in OpenAI's words."""
    return "length" if reason == "length" else "stop"


def image_part(png: str) -> dict[str, Any]:
    """A part of a message's content that holds a PNG in base64."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}


def usage_of(usages: Sequence[Usage], modalities: Sequence[str]) -> dict[str, Any]:
    """The usage of all choices together. They share one prompt, which counts once.

    What is known of the details is told, what is not is left out: some models do not count the
    tokens of speech.
    """
    first = usages[0]
    made = sum(usage.generated_tokens for usage in usages)
    spoken = sum(usage.speech_tokens for usage in usages)
    details = {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    }
    if spoken or tuple(modalities) == ("text",):
        details |= {"text_tokens": made - spoken, "audio_tokens": spoken}
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": first.prompt_tokens + made,
        "prompt_tokens_details": {
            "cached_tokens": first.cached_tokens,
            "text_tokens": first.prompt_tokens - first.image_tokens - first.audio_tokens,
            "image_tokens": first.image_tokens,
            "audio_tokens": first.audio_tokens,
        },
        "completion_tokens_details": details,
    }


def logprobs_of(events: Iterable[Event]) -> dict[str, Any]:
    """The probabilities that came with pieces of text."""
    tokens = [
        {**_token(entry), "top_logprobs": [_token(other) for other in entry["top_logprobs"]]}
        for event in events
        if isinstance(event, TextChunk)
        for entry in event.metadata.get("logprobs") or ()
    ]
    return {"content": tokens, "refusal": None}


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    logprob = float(entry["logprob"])
    if math.isnan(logprob) or logprob < _UNLIKELY:
        logprob = _UNLIKELY
    data = entry["bytes"]
    octets = None if data is None else [int(octet) for octet in data]
    return {"token": entry["token"], "logprob": logprob, "bytes": octets}
