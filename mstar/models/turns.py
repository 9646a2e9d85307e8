"""Conversations: who said what, with which media, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mstar.errors import InvalidRequest
from mstar.io.data_url import decode_base64, decode_data_url
from mstar.models.base import Inputs

__all__ = ["ROLES", "Part", "Turn", "turns_of"]

ROLES = ("system", "user", "assistant")
_ALIASES = {"developer": "system"}
_FIELDS = {"image": "images", "audio": "audio", "video": "video"}
_PARTS = (
    '{"type": "text", "text": ...}, {"type": "image", "image": media}, audio and video alike, '
    'or OpenAI\'s {"type": "image_url", "image_url": {"url": "data:..."}}'
)


@dataclass(frozen=True)
class Part:
    """`kind` is `"text"`, `"image"`, `"audio"` or `"video"`; `value` the text or the medium."""

    kind: str
    value: Any


@dataclass(frozen=True)
class Turn:
    """What one role says."""

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text alone."""
        return "".join(part.value for part in self.parts if part.kind == "text")


def turns_of(inputs: Inputs, kinds: tuple[str, ...]) -> list[Turn]:
    """The conversation that was given; text and media outside `messages` are one turn of the user.

    Without `input_modalities`, media come before the text. With it, every mention takes the next
    item of its kind, and the last mention of a kind takes all that are left.

    Args:
        kinds: what the model takes.

    Raises:
        InvalidRequest: a message is not what it must be.
    """
    if inputs.messages is None:
        return [Turn("user", tuple(_ordered(inputs)))]
    if any(getattr(inputs, field) for field in _FIELDS.values()):
        raise InvalidRequest("messages", None, "media go into the messages, not beside them")
    messages = inputs.messages
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequest("messages", messages, "must be a list that is not empty")
    return [_turn(message, kinds) for message in messages]


def _ordered(inputs: Inputs) -> list[Part]:
    left = {kind: list(getattr(inputs, field)) for kind, field in _FIELDS.items()}
    left["text"] = [] if inputs.text is None else [inputs.text]
    order = inputs.input_modalities or tuple(kind for kind in left if left[kind])
    for kind, items in left.items():
        mentions = order.count(kind)
        if items and not mentions:
            raise InvalidRequest("input_modalities", list(order), f"{kind} is given, too")
        if mentions > len(items):
            allowed = f"{kind} is named {mentions} times and given {len(items)} times"
            raise InvalidRequest("input_modalities", list(order), allowed)
    parts: list[Part] = []
    for index, kind in enumerate(order):
        last = kind not in order[index + 1 :]
        taken = left[kind] if last else left[kind][:1]
        left[kind] = left[kind][len(taken) :]
        parts += [Part(kind, value) for value in taken]
    return parts


def _turn(message: Any, kinds: tuple[str, ...]) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise InvalidRequest("messages", message, 'must be {"role": ..., "content": ...}')
    role, content = message["role"], message["content"]
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise InvalidRequest("messages", role, f"role must be one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return Turn(role, (Part("text", content),))
    if not isinstance(content, (list, tuple)):
        raise InvalidRequest("messages", content, "content must be a string or a list of parts")
    parts = tuple(_part(part) for part in content)
    for part in parts:
        if part.kind not in kinds:
            allowed = f"the model takes {', '.join(kinds)} only"
            raise InvalidRequest("messages", part.kind, allowed)
    return Turn(role, parts)


def _part(part: Any) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    value = part.get(kind) if isinstance(kind, str) else None
    if kind == "text" and isinstance(value, str):
        return Part("text", value)
    if kind in _FIELDS and value is not None:
        return Part(kind, value)
    if kind == "input_audio" and isinstance(value, Mapping):
        return Part("audio", decode_base64("messages", value.get("data")))
    for medium in _FIELDS:
        if kind == f"{medium}_url":
            url = value.get("url") if isinstance(value, Mapping) else value
            return Part(medium, _of_url(url))
    raise InvalidRequest("messages", part, f"parts are {_PARTS}")


def _of_url(url: Any) -> bytes:
    if not isinstance(url, str) or not url.startswith("data:"):
        raise InvalidRequest("messages", url, "URLs must be data URLs: nothing is fetched")
    return decode_data_url("messages", url)
