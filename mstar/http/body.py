"""Bodies of requests, read within limits and taken apart away from the event loop."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from mstar.http.errors import Refused
from mstar.http.front import Front, off_loop
from mstar.http.record import record_of

__all__ = [
    *("JSON", "MULTIPART", "URLENCODED", "Part", "check_marks", "content_type", "read_form"),
    *("read_json", "whole_json"),
]

JSON, MULTIPART = b"application/json", b"multipart/form-data"
URLENCODED = b"application/x-www-form-urlencoded"
_MOST_PARTS = 256
_MOST_MARKS = 400_000  # of JSON: the objects, lists and keys take many times the bytes of the text
_MARKS = (b",", b":", b"[", b"{")
_STRETCH = 12  # bytes of an urlencoded character: 4 of UTF-8 as %XX
_PIECE = 2**20
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass
class Part:
    """One field of a form, in memory. The file name is never used as a path."""

    name: str
    data: bytes = b""
    filename: str | None = None
    pieces: list[bytes] = field(default_factory=list, repr=False)

    def text(self) -> str:
        """The value as text.

        Raises:
            Refused: it is not UTF-8.
        """
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError:
            raise Refused(400, f"{self.name}: must be UTF-8", param=self.name) from None


async def read_body(front: Front, request: Request, most: int | None = None) -> bytes:
    """The whole body, which counts as held until the request has ended.

    Args:
        most: bytes, where that is less than any body may have.

    Raises:
        Refused: it is too long (413), does not come (408), or all bodies together are too much
            (503).
    """
    limit = min(front.settings.max_body_bytes, most or sys.maxsize)
    record = record_of(request.scope)
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and len(stated) < 20 and int(stated) > limit:
        raise _too_long(limit)

    async def collect() -> bytes:
        pieces, size = [], 0
        async for piece in request.stream():
            size += len(piece)
            if size > limit:
                raise _too_long(limit)
            if front.held + len(piece) > front.settings.max_held_bytes:
                message = "the server holds as many bytes of other requests as it can"
                headers = {"connection": "close"}
                raise Refused(503, message, kind="EngineOverloaded", headers=headers)
            front.held += len(piece)
            record.held += len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    try:
        return await asyncio.wait_for(collect(), front.settings.body_timeout)
    except asyncio.TimeoutError:
        headers = {"connection": "close"}
        raise Refused(408, "the body did not come in time", headers=headers) from None


def content_type(
    request: Request, kinds: Sequence[bytes], allowed: str, *, status: int = 400
) -> tuple[bytes, dict[bytes, bytes]]:
    """What the body is said to be, and the options of that; `Refused` if it is none of `kinds`."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind not in kinds:
        given = kind.decode("latin-1") or "none"
        raise Refused(status, f"content-type: must be {allowed}, not {given}")
    return kind, options


async def read_form(front: Front, request: Request) -> list[Part]:
    """The fields of a form in their order, multipart or urlencoded.

    Raises:
        Refused: it is no form, or a broken one.
    """
    allowed = "multipart/form-data or urlencoded"
    kind, options = content_type(request, (MULTIPART, URLENCODED), allowed, status=415)
    if kind == MULTIPART:
        body = await read_body(front, request)
        boundary = options.get(b"boundary", b"")
        if not 0 < len(boundary) <= 256:
            raise Refused(400, "content-type: multipart/form-data needs a boundary")
        return await off_loop(split_multipart, body, boundary, size=len(body))
    body = await read_body(front, request, 2 * _STRETCH * front.settings.max_text_chars)
    return await off_loop(split_urlencoded, body, size=len(body))


async def read_json(front: Front, request: Request) -> dict[str, Any]:
    """The JSON object in the body.

    Raises:
        Refused: it is not one.
    """
    content_type(request, (JSON,), "application/json")
    body = await read_body(front, request)
    return await off_loop(whole_json, body, "the body", size=len(body))


def whole_json(data: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object of plain JSON: no NaN, no infinities, no halves of surrogate pairs.

    Raises:
        Refused: it is not one, or holds too many things; the message begins with `what`.
    """
    check_marks(data, what)
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if "\\u" in text and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            raise ValueError("half of a surrogate pair")
    except UnicodeDecodeError:
        raise Refused(400, f"{what} must be UTF-8") from None
    except RecursionError:
        raise Refused(400, f"{what} is nested too deeply") from None
    except ValueError as error:
        words = "an integer has too many digits" if "digits" in str(error) else error
        raise Refused(400, f"{what} is not valid JSON: {words}"[:300]) from None
    if not isinstance(value, dict):
        raise Refused(400, f"{what} must be a JSON object, not {type(value).__name__}")
    return value


def check_marks(data: bytes | str, what: str) -> None:
    """Refuse JSON that would take seconds and gigabytes, while no other thread can run. Piece by
    piece, so that they can run in between; a long string costs nothing."""
    marks = [mark.decode() for mark in _MARKS] if isinstance(data, str) else _MARKS
    count = 0
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        count += sum(map(piece.count, marks))
        if count > _MOST_MARKS:
            raise Refused(413, f"{what} has more than {_MOST_MARKS} values and keys")


def split_urlencoded(body: bytes) -> list[Part]:
    """The fields of an urlencoded form."""
    try:
        pairs = parse_qsl(
            body.decode("utf-8"),
            keep_blank_values=True,
            max_num_fields=_MOST_PARTS,
            errors="strict",
        )
    except UnicodeDecodeError:
        raise Refused(400, "the form must be UTF-8") from None
    except ValueError:
        raise Refused(400, f"the form has more than {_MOST_PARTS} fields") from None
    return [Part(name, value.encode()) for name, value in pairs]


def split_multipart(body: bytes, boundary: bytes) -> list[Part]:
    """The parts of a multipart form."""
    parts: list[Part] = []
    header: dict[bytes, bytes] = {}
    name = value = b""
    ended = False

    def on_part_begin() -> None:
        if len(parts) == _MOST_PARTS:
            raise Refused(400, f"the form has more than {_MOST_PARTS} parts")
        header.clear()
        parts.append(Part(""))

    def on_header_field(data: bytes, start: int, end: int) -> None:
        nonlocal name
        name += data[start:end]

    def on_header_value(data: bytes, start: int, end: int) -> None:
        nonlocal value
        value += data[start:end]

    def on_header_end() -> None:
        nonlocal name, value
        header[name.lower()] = value
        name = value = b""

    def on_headers_finished() -> None:
        _, options = parse_options_header(header.get(b"content-disposition", b""))
        if b"name" not in options:
            raise Refused(400, "a part of the form has no name")
        parts[-1].name = options[b"name"].decode("utf-8", "replace")
        if b"filename" in options:
            parts[-1].filename = options[b"filename"].decode("utf-8", "replace")

    def on_part_data(data: bytes, start: int, end: int) -> None:
        parts[-1].pieces.append(data[start:end])

    def on_part_end() -> None:
        parts[-1].data = b"".join(parts[-1].pieces)
        parts[-1].pieces.clear()

    def on_end() -> None:
        nonlocal ended
        ended = True

    calls = (on_part_begin, on_header_field, on_header_value, on_header_end)
    calls += (on_headers_finished, on_part_data, on_part_end, on_end)
    try:
        parser = MultipartParser(boundary, {call.__name__: call for call in calls})
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise Refused(400, f"the form is broken: {error}") from None
    if not ended:
        raise Refused(400, "the form is broken: it ends before its last boundary")
    return parts


def _too_long(limit: int) -> Refused:
    message = f"the body is longer than the {limit} bytes that this server takes"
    return Refused(413, message, headers={"connection": "close"})


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large a number")
    return number
