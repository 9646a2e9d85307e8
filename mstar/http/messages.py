"""Conversations from the network: text, and media inside data URLs. Anything else that stands for
media could be a path on the server, and is refused."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from mstar.errors import InvalidRequest
from mstar.io.sniff import kind_of
from mstar.models.card import ModelCard

__all__ = ["read_messages"]

_KINDS = ("image", "audio", "video")
_ALLOWED = 'parts are {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": \
"data:..."}}, and audio_url, video_url, input_audio alike'


def read_messages(card: ModelCard, messages: Any) -> list[dict[str, Any]]:
    """`messages` for the Engine, their media as bytes.

    Raises:
        InvalidRequest: the model does not chat, or a message is not what it must be.
    """
    if not card.chat:
        raise InvalidRequest("messages", None, f"{card.name} does not chat; use text")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", messages, "must be a list that is not empty")
    return [_message(card, message) for message in messages]


def _message(card: ModelCard, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise InvalidRequest("messages", message, 'must be {"role": ..., "content": ...}')
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise InvalidRequest("messages", message, "role must be a string")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise InvalidRequest("messages", message, "content must be a string or a list of parts")
    return {"role": role, "content": [_part(card, part) for part in content]}


def _part(card: ModelCard, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    value = part.get(kind) if isinstance(kind, str) else None
    if kind == "text" and isinstance(value, str):
        return {"type": "text", "text": value}
    if kind == "input_audio" and isinstance(value, dict):
        return _media(card, "audio", value.get("data"))
    for media in _KINDS:
        if kind == f"{media}_url":
            url = value.get("url") if isinstance(value, dict) else value
            return _media(card, media, _data_of(url))
    raise InvalidRequest("messages", part, _ALLOWED)


def _data_of(url: Any) -> str:
    if not isinstance(url, str) or not url.startswith("data:"):
        raise InvalidRequest("messages", url, "media must be a data URL: nothing is fetched")
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InvalidRequest("messages", url, "a data URL must be base64")
    return data


def _media(card: ModelCard, kind: str, data: Any) -> dict[str, Any]:
    if kind not in card.inputs:
        raise InvalidRequest("messages", kind, f"{card.name} takes {', '.join(card.inputs)} only")
    try:
        content = base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise InvalidRequest("messages", data, "is not base64") from None
    held = kind_of(content) if content else "nothing"
    if held not in (kind, None):
        raise InvalidRequest("messages", kind, f"the data holds {held}")
    return {"type": kind, kind: content}
