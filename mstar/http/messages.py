"""Conversations from the network, in two steps: what the messages say is checked at once, then the
media that they name are brought as bytes.

Media are named by URLs only: anything else that stands for them could be a path on the server.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mstar.errors import InvalidRequest
from mstar.http.front import Front
from mstar.http.media import media_bytes
from mstar.io.sniff import kind_of
from mstar.models.card import ModelCard

__all__ = ["Media", "read_messages", "with_media"]

_ROLES = ("developer", "system", "user", "assistant", "tool")
_ROLE_OF = {"developer": "system"}  # a newer name for the same
_KINDS = ("image", "audio", "video")
_AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "m4a", "aac")
_DETAILS = ("auto", "low", "high", "original")
_SHAPE = 'must be {"role": ..., "content": ...}'
_PARTS = 'parts are {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": \
...}}, and audio_url, video_url, input_audio, file, refusal alike'
_MOST_MESSAGES = 4096
_MOST_PARTS = 8192  # of all messages together
_MOST_MEDIA = 256
_LOOK_AT = 4096  # characters of base64 that tell what a file is


@dataclass(frozen=True)
class Media:
    """Media still to be brought.

    Args:
        kind: `"image"`, `"audio"` or `"video"`.
        url: where they are.
        field: where the URL stands, for messages of errors.
    """

    kind: str
    url: str
    field: str


@dataclass(frozen=True)
class _Reader:
    card: ModelCard
    longest: int
    spoken: Callable[[str], str | None]


def read_messages(
    card: ModelCard,
    messages: Any,
    *,
    longest: int,
    spoken: Callable[[str], str | None] = lambda id: None,
) -> list[dict[str, Any]]:
    """`messages` for the Engine, with `Media` where it takes bytes.

    Args:
        messages: as they came.
        longest: characters of one text.
        spoken: what was said in an earlier reply of sound, by its id.

    Raises:
        InvalidRequest: the model does not chat, or a message is not what it must be.
    """
    if not card.chat:
        raise InvalidRequest("messages", None, f"{card.name} does not chat; use text")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", messages, "must be a list that is not empty")
    if len(messages) > _MOST_MESSAGES:
        many = f"{len(messages)} messages"
        raise InvalidRequest("messages", many, f"must be at most {_MOST_MESSAGES}")
    reader = _Reader(card, longest, spoken)
    read = [_message(reader, item, f"messages[{i}]") for i, item in enumerate(messages)]
    parts = sum(len(_parts(message)) for message in read)
    media = sum(len(_media(message)) for message in read)
    for count, most, what in (
        (parts, _MOST_PARTS, "parts"),
        (media, _MOST_MEDIA, "images, sounds and videos"),
    ):
        if count > most:
            raise InvalidRequest("messages", f"{count} {what}", f"must be at most {most}")
    return read


async def with_media(front: Front, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `read_messages` made, its media as bytes.

    Raises:
        InvalidRequest, Refused: media that cannot be had, or are not what they are said to be.
    """
    whole = []
    for message in messages:
        if _media(message):
            message = {**message, "content": [await _whole(front, p) for p in message["content"]]}
        whole.append(message)
    return whole


async def _whole(front: Front, part: dict[str, Any]) -> dict[str, Any]:
    media = part[part["type"]]
    if not isinstance(media, Media):
        return part
    data = await media_bytes(front, media.kind, media.url, media.field)
    return {"type": media.kind, media.kind: data}


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else []


def _media(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [part for part in _parts(message) if part["type"] in _KINDS]


def _message(reader: _Reader, message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict) or "role" not in message:
        raise InvalidRequest(place, message, _SHAPE)
    role = message["role"]
    if not isinstance(role, str):
        raise InvalidRequest(f"{place}.role", role, "role must be a string")
    if role not in _ROLES:
        raise InvalidRequest(f"{place}.role", role, f"must be one of {', '.join(_ROLES)}")
    for name in ("name", "tool_call_id"):
        if not isinstance(message.get(name), (str, type(None))):
            raise InvalidRequest(f"{place}.{name}", message[name], "must be a string")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            allowed = f"{reader.card.name} calls no tools"
            raise InvalidRequest(f"{place}.{name}", message[name], allowed)
    content = message.get("content")
    if content is None:
        content = _instead(message, place)
    said = _spoken(reader, message, place) if message.get("audio") is not None else None
    if said is not None and not content:
        return {"role": "assistant", "content": said}
    role = _ROLE_OF.get(role, role)
    if isinstance(content, str):
        return {"role": role, "content": _text(reader, content, f"{place}.content")}
    if not isinstance(content, list):
        if "content" not in message:
            raise InvalidRequest(place, message, _SHAPE)
        allowed = "content must be a string or a list of parts"
        raise InvalidRequest(f"{place}.content", content, allowed)
    if not content:
        raise InvalidRequest(f"{place}.content", content, "must hold at least one part")
    parts = [_part(reader, part, f"{place}.content[{i}]") for i, part in enumerate(content)]
    return {"role": role, "content": parts}


def _instead(message: Mapping[str, Any], place: str) -> Any:
    """What an assistant's message without content says."""
    refusal = message.get("refusal")
    if not isinstance(refusal, (str, type(None))):
        raise InvalidRequest(f"{place}.refusal", refusal, "must be a string")
    return refusal if message["role"] == "assistant" else None


def _spoken(reader: _Reader, message: Mapping[str, Any], place: str) -> str:
    audio = message["audio"]
    if message["role"] != "assistant":
        raise InvalidRequest(f"{place}.audio", audio, "belongs to messages of the assistant only")
    id = audio.get("id") if isinstance(audio, dict) else None
    if not isinstance(id, str):
        raise InvalidRequest(f"{place}.audio", audio, 'must be {"id": ...}')
    said = reader.spoken(id)
    if said is None:
        allowed = "there is no such audio here: unknown, or expired"
        raise InvalidRequest(f"{place}.audio.id", id, allowed)
    return said


def _text(reader: _Reader, text: str, place: str) -> str:
    if len(text) > reader.longest:
        allowed = f"must be at most {reader.longest} characters"
        raise InvalidRequest(place, f"{len(text)} characters", allowed)
    if "\0" in text:
        raise InvalidRequest(place, text[:80], "must not hold NUL characters")
    return text


def _part(reader: _Reader, part: Any, place: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    value = part.get(kind) if isinstance(kind, str) else None
    if kind in ("text", "refusal") and isinstance(value, str):
        return {"type": "text", "text": _text(reader, value, f"{place}.{kind}")}
    inside = f"{place}.{kind}"
    if kind == "input_audio" and isinstance(value, dict):
        return _placed(reader, "audio", _audio_url(value, inside), inside)
    if kind == "file" and isinstance(value, dict):
        return _placed(reader, *_file_url(value, inside), inside)
    for media in _KINDS:
        if kind == f"{media}_url":
            return _placed(reader, media, _url(value, inside), inside)
    raise InvalidRequest(place, part, _PARTS)


def _placed(reader: _Reader, kind: str, url: str, place: str) -> dict[str, Any]:
    card = reader.card
    if kind not in card.inputs:
        raise InvalidRequest(place, kind, f"{card.name} takes {', '.join(card.inputs)} only")
    return {"type": kind, kind: Media(kind, url, place)}


def _url(value: Any, place: str) -> str:
    """The URL of `image_url` and its like: an object with it, or the string itself."""
    url = value
    if isinstance(value, dict):
        url = value.get("url")
        if value.get("detail") not in (*_DETAILS, None):
            allowed = f"must be one of {', '.join(_DETAILS)}"
            raise InvalidRequest(f"{place}.detail", value["detail"], allowed)
    if not isinstance(url, str):
        raise InvalidRequest(place, url, "must be a data URL, or another that this server takes")
    return url


def _audio_url(value: Mapping[str, Any], place: str) -> str:
    data, format = value.get("data"), value.get("format")
    if not isinstance(data, str):
        raise InvalidRequest(f"{place}.data", data, "is not base64 text")
    if format not in (*_AUDIO_FORMATS, None):
        allowed = f"must be one of {', '.join(_AUDIO_FORMATS)}"
        raise InvalidRequest(f"{place}.format", format, allowed)
    return data if data.startswith("data:") else f"data:audio/{format or 'wav'};base64,{data}"


def _file_url(value: Mapping[str, Any], place: str) -> tuple[str, str]:
    """What kind of media a file holds, and its URL."""
    data, name = value.get("file_data"), value.get("filename")
    if value.get("file_id") is not None:
        allowed = "no files are kept here: send file_data"
        raise InvalidRequest(f"{place}.file_id", value["file_id"], allowed)
    if not isinstance(data, str):
        raise InvalidRequest(f"{place}.file_data", data, "is not base64 text")
    if not isinstance(name, (str, type(None))):
        raise InvalidRequest(f"{place}.filename", name, "must be a string")
    url = data if data.startswith("data:") else f"data:;base64,{data}"
    head, _, body = url[: _LOOK_AT + 100].partition(",")
    try:
        kind = kind_of(base64.b64decode(body[: len(body) // 4 * 4][:_LOOK_AT]), name)
    except InvalidRequest as error:
        raise InvalidRequest(f"{place}.filename", (name or "")[:80], error.allowed) from None
    except ValueError:
        raise InvalidRequest(f"{place}.file_data", data[:40], "is not base64") from None
    if kind is None:
        kind = head.removeprefix("data:").partition("/")[0]
    if kind not in _KINDS:
        held = kind if kind == "text" else "nothing known"
        allowed = f"the file holds {held}; it must hold one of {', '.join(_KINDS)}"
        raise InvalidRequest(place, None, allowed)
    return kind, url
