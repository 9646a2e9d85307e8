"""Media that a request names instead of bringing it as a file: `data:` URLs always, others where
the operator allows them."""

from __future__ import annotations

from typing import Any

from mstar.errors import InvalidRequest
from mstar.http.allowance import allowance_of
from mstar.http.front import Front, off_loop
from mstar.http.limits import check_media
from mstar.http.local_files import read_inside
from mstar.http.remote import fetch
from mstar.http.settings import Settings
from mstar.io.data_url import decode_data_url
from mstar.io.sniff import kind_of

__all__ = ["media_bytes"]

_ANY_NAME = {"image": "x.png", "audio": "x.wav", "video": "x.mp4"}


async def media_bytes(front: Front, kind: str, url: Any, field: str) -> bytes:
    """The bytes behind a URL, checked against the limits of the server.

    Args:
        kind: `image`, `audio` or `video`: what the bytes must be.
        url: `data:` in base64; `http:` or `https:` with `allow_remote_media`; `file:` or a path
            with `media_dir`.
        field: to name in errors.

    Raises:
        InvalidRequest: it cannot be had, is something else, or is too large.
    """
    settings = front.settings
    if not isinstance(url, str):
        raise InvalidRequest(field, url, "must be a data URL, as a string")
    scheme = url[:8].partition(":")[0].lower() if ":" in url[:8] else ""
    if scheme == "data":
        data = await off_loop(decode_data_url, field, url, size=len(url))
    elif scheme in ("http", "https"):
        if not settings.allow_remote_media:
            allowed = "must be a data URL: nothing is fetched without --allow-remote-media"
            raise InvalidRequest(field, url[:80], allowed)
        data = await fetch(url, field, allowance_of(settings))
    else:
        if settings.media_dir is None:
            allowed = "must be a data URL: no file is read without --media-dir"
            raise InvalidRequest(field, url[:80], allowed)
        allowance = allowance_of(settings)
        allowance.begin(field)
        args = (settings.media_dir, url, field, allowance)
        data = await off_loop(read_inside, *args, always=True)
    await off_loop(_check, settings, kind, data, field, always=True)
    return data


def _check(settings: Settings, kind: str, data: bytes, field: str) -> None:
    if not data:
        raise InvalidRequest(field, kind, "the data holds nothing")
    try:
        kind_of(data, _ANY_NAME[kind])  # what could be either is what it is said to be
    except InvalidRequest:
        held = kind_of(data)
        if (kind, held) != ("video", "image"):  # those may move
            raise InvalidRequest(field, kind, f"the data holds {held}") from None
    check_media(settings, kind, data, field)
