"""The fields, images and mask of an edit, from a form or JSON, checked before anything is run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fastapi import Request

from mstar.errors import InvalidRequest
from mstar.http.body import (
    JSON,
    MULTIPART,
    URLENCODED,
    Part,
    check_marks,
    content_type,
    read_form,
    read_json,
    whole_json,
)
from mstar.http.errors import Refused
from mstar.http.front import Front, off_loop
from mstar.http.limits import check_media
from mstar.http.media import media_bytes
from mstar.http.openai.common import flat, unsupported
from mstar.http.openai.images_fields import FIELDS, KNOWN, UNSUPPORTED
from mstar.http.openai.images_params import Uploads
from mstar.http.openai.images_surface import ImagesSurface
from mstar.http.settings import Settings
from mstar.io.image import Picture, read_picture
from mstar.models.card import ModelCard

__all__ = ["read_edit"]

_MOST_UPLOADS = 16
_NESTED = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")  # name[] and name[key]
_IMAGES = ("image", "image[]")
_FORMS = 'must be a data URL, or {"image_url": ...} with one'


async def read_edit(
    front: Front, surface: ImagesSurface, request: Request
) -> tuple[dict[str, Any], Uploads]:
    """Fields, by name and typed, and files of an edit.

    Raises:
        Refused, InvalidRequest: one of them is not what it must be, or cannot be had.
    """
    allowed = "multipart/form-data or application/json"
    kind, _ = content_type(request, (MULTIPART, URLENCODED, JSON), allowed)
    parts: list[Part] = []
    if kind == JSON:
        fields = flat(await read_json(front, request))
    else:
        parts = await read_form(front, request)
        size = sum(len(part.data) for part in parts)
        fields = flat(await off_loop(_fields, front.card, parts, size=size))
    if fields.get("image") is not None and fields.get("images") is not None:
        raise InvalidRequest("images", "both", "give either image or images, not both")
    name = "images" if fields.get("images") is not None else "image"
    images = [part.data for part in parts if part.name in _IMAGES]
    images += await _named(front, name, fields.get(name))
    masks = [part.data for part in parts if part.name == "mask"]
    masks += await _named(front, "mask", fields.get("mask"))
    return fields, await _uploads(front, surface, images, masks)


def _fields(card: ModelCard, parts: Sequence[Part]) -> dict[str, Any]:
    """What a form says beside its files. What is no field of OpenAI's is a parameter of the model;
    lists and objects are JSON, or come as `name[]` and `name[key]`."""
    fields: dict[str, Any] = {}
    for part in parts:
        if part.name not in (*_IMAGES, "mask"):
            _read(card, fields, part)
    return fields


def _read(card: ModelCard, fields: dict[str, Any], part: Part) -> None:
    name, nested = part.name, _NESTED.fullmatch(part.name)
    if nested is not None:
        name, key = nested.groups()
        held = fields.setdefault(name, {} if key else [])
        if isinstance(held, dict) and key and key not in held:
            held[key] = _json_or_text(part.text())
        elif isinstance(held, list) and not key:
            held.append(_json_or_text(part.text()))
        else:
            raise InvalidRequest(name, "twice", "must be given once")
        return
    if name in fields:
        raise InvalidRequest(name[:80], "twice", "must be given once")
    fields[name] = _value(card, part)


def _value(card: ModelCard, part: Part) -> Any:
    """The value of a field; `None`, which means "not given", where a form leaves it empty."""
    name = part.name
    if name in FIELDS:
        return FIELDS[name].parse(part.text()) if part.data else None
    if name in KNOWN:
        return part.text() or ("" if name == "prompt" else None)
    if name in UNSUPPORTED:
        return part.filename or part.text() or None
    if name == "extra_body":
        return whole_json(part.text(), "extra_body") if part.data else None
    if name not in card.parameters:
        return ""  # is ignored
    if part.filename is not None:
        raise Refused(400, f"{name}: must be a value, not a file", param=name)
    text, parameter = part.text(), card.parameters[name]
    check_marks(text, name)
    return parameter.parse(text) if text or parameter.kind is str else None


def _json_or_text(text: str) -> Any:
    check_marks(text, "the form")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def _uploads(
    front: Front, surface: ImagesSurface, images: Sequence[bytes], masks: Sequence[bytes]
) -> Uploads:
    """The files, each looked at."""
    if not images:
        raise InvalidRequest("image", None, "there is no image to edit")
    if len(images) > _MOST_UPLOADS:
        raise _too_many(len(images))
    if len(masks) > 1:
        raise InvalidRequest("mask", f"{len(masks)} masks", "must be given once")
    if masks and surface.mask is None:
        raise unsupported("mask", None, f"{front.card.name} takes no mask; say it in the prompt")
    first, *_ = [await _picture(front, "image", data) for data in images]
    size = (first.width, first.height)
    if not masks:
        return Uploads(images, size)
    mask = await _picture(front, "mask", masks[0])
    if mask.format != "png":
        raise InvalidRequest("mask", mask.format, "must be a PNG")
    if not mask.transparent:
        allowed = "has no alpha channel: pixels of alpha 0 are those to edit"
        raise InvalidRequest("mask", None, allowed)
    if (mask.width, mask.height) != size:
        allowed = f"must have the size of the image, {size[0]}x{size[1]}"
        raise InvalidRequest("mask", f"{mask.width}x{mask.height}", allowed)
    return Uploads(images, size, masks[0])


async def _picture(front: Front, field: str, data: bytes) -> Picture:
    """Each on its own, so that the work of other requests comes in between."""
    if not data:
        raise InvalidRequest(field, None, "the file is empty")
    return await off_loop(_looked_at, front.settings, field, data, always=True)


def _looked_at(settings: Settings, field: str, data: bytes) -> Picture:
    check_media(settings, "image", data, field)
    return read_picture(field, data, settings.max_pixels)


async def _named(front: Front, name: str, value: Any) -> list[bytes]:
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if len(values) > _MOST_UPLOADS:
        raise _too_many(len(values))
    return [await _one(front, name, item) for item in values]


async def _one(front: Front, name: str, value: Any) -> bytes:
    if isinstance(value, dict) and "file_id" in value:
        raise unsupported(name, None, f"no files are kept here; {_FORMS}")
    url = value.get("image_url") if isinstance(value, dict) else value
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise InvalidRequest(name, value, _FORMS)
    return await media_bytes(front, "image", url, name)


def _too_many(count: int) -> InvalidRequest:
    return InvalidRequest("image", f"{count} images", f"must be at most {_MOST_UPLOADS}")
