"""Media in the folder that the operator opens to clients."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mstar.errors import InvalidRequest
from mstar.http.allowance import Allowance

__all__ = ["read_inside"]

_LONGEST = 4096
# A pipe must not block, and a link that appears after the check must not be followed.
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_FLAGS |= getattr(os, "O_BINARY", 0)


def read_inside(folder: Path, url: str, field: str, allowance: Allowance) -> bytes:
    """A file in a folder.

    Args:
        folder: see `Settings.media_dir`.
        url: a `file:` URL, or a path; a relative one is taken from the folder.
        field: to name in errors.
        allowance: what may be read.

    Raises:
        InvalidRequest: it leaves the folder, also by a link, is no plain file, or is too large.
    """
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, _path_of(url, field)))
    if not path.startswith(os.path.join(root, "")):
        raise InvalidRequest(field, url[:80], "must lie in the server's folder of media")
    try:
        file = open(path, "rb", opener=lambda path, _: os.open(path, _FLAGS))  # noqa: SIM115
    except OSError:
        raise InvalidRequest(field, url[:80], "there is no such file") from None
    with file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise InvalidRequest(field, url[:80], "is no plain file")
        if not _is_still(path, found):
            raise InvalidRequest(field, url[:80], "must lie in the server's folder of media")
        room = allowance.left()
        data = file.read(room + 1) if found.st_size <= room else b""
    if found.st_size > room or not allowance.take(len(data)):
        raise InvalidRequest(field, url[:80], "has more bytes than this server takes")
    return data


def _is_still(path: str, found: os.stat_result) -> bool:
    """Whether what was opened is what lies at the path, and no folder on the way became a link."""
    try:
        return os.path.realpath(path) == path and os.path.samestat(os.stat(path), found)
    except OSError:
        return False


def _path_of(url: str, field: str) -> str:
    path = url
    if url[:5].lower() == "file:":
        try:
            parts = urlsplit(url)
        except ValueError:
            raise InvalidRequest(field, url[:80], "is not a URL") from None
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise InvalidRequest(field, url[:80], "must be file:///path, without anything else")
        path = unquote(parts.path)
    elif "://" in url[:32]:
        raise InvalidRequest(field, url[:80], "must be a data, http, https or file URL, or a path")
    if not path or "\0" in path or len(path) > _LONGEST:
        raise InvalidRequest(field, url[:80], "is not a path")
    return path
