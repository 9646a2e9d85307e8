"""The images and the mask of an edit, from a form or from JSON, checked before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mstar.errors import InvalidRequest
from mstar.http.front import Front, off_loop
from mstar.http.limits import check_media
from mstar.http.media import media_bytes
from mstar.http.openai.common import unsupported
from mstar.http.openai.images_params import Uploads
from mstar.http.openai.images_surface import ImagesSurface
from mstar.http.settings import Settings
from mstar.io.image import Picture, read_picture

__all__ = ["from_json", "uploads_of"]

_MOST_UPLOADS = 16
_FORMS = 'must be a data URL, or {"image_url": ...} with one'


async def from_json(front: Front, fields: dict[str, Any]) -> tuple[list[bytes], list[bytes]]:
    """Images and masks of an edit in JSON: `images` or `image`, and `mask`.

    Raises:
        Refused, InvalidRequest: one of them is not what it must be, or cannot be had.
    """
    if fields.get("image") is not None and fields.get("images") is not None:
        raise InvalidRequest("images", "both", "give either image or images, not both")
    name = "images" if fields.get("images") is not None else "image"
    return await _all(front, name, fields.get(name)), await _all(front, "mask", fields.get("mask"))


async def uploads_of(
    front: Front, surface: ImagesSurface, images: Sequence[bytes], masks: Sequence[bytes]
) -> Uploads:
    """The files of an edit, each looked at.

    Raises:
        Refused, InvalidRequest: too few, too many, not whole, or not such as belong together.
    """
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


async def _all(front: Front, name: str, value: Any) -> list[bytes]:
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
