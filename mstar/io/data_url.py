"""`data:` URLs (RFC 2397), in base64."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from mstar.errors import InvalidRequest

__all__ = ["decode_base64", "decode_data_url"]


def decode_data_url(field: str, url: str) -> bytes:
    """What a data URL holds.

    Args:
        field: where it came from, for messages.

    Raises:
        InvalidRequest: it is not one in base64.
    """
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequest(field, url[:80], "a data URL must be base64")
    return decode_base64(field, data)


def decode_base64(field: str, data: Any) -> bytes:
    """The bytes of base64; see `decode_data_url`."""
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise InvalidRequest(field, str(data)[:80], "is not base64") from None
