"""What a client sends to the native route: one multipart form. Needs neither torch nor numpy."""

from __future__ import annotations

import base64
import json
import math
import mimetypes
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mstar.errors import InvalidRequest
from mstar.io.sniff import EXTENSIONS

__all__ = ["Form", "make_form", "seconds"]

_MEDIA = ("image", "audio", "video")
_FIELD_OF = {"image": "images", "audio": "audio", "video": "video"}
_SUFFIXES = {kind: tuple(f".{name}" for name in EXTENSIONS[kind]) for kind in _MEDIA}
_MAGIC = (
    (0, b"\x89PNG", "image", ".png"),
    (0, b"\xff\xd8\xff", "image", ".jpg"),
    (0, b"GIF8", "image", ".gif"),
    (0, b"BM", "image", ".bmp"),
    (0, b"II*\0", "image", ".tiff"),
    (0, b"MM\0*", "image", ".tiff"),
    (8, b"WEBP", "image", ".webp"),
    (0, b"fLaC", "audio", ".flac"),
    (0, b"OggS", "audio", ".ogg"),
    (4, b"ftypM4A", "audio", ".m4a"),
    (0, b"ID3", "audio", ".mp3"),
    (0, b"\xff\xf1", "audio", ".aac"),
    (0, b"\xff\xf9", "audio", ".aac"),
    (0, b"\xff", "audio", ".mp3"),
    (4, b"ftypqt", "video", ".mov"),
    (8, b"AVI ", "video", ".avi"),
    (0, b"\x1aE\xdf\xa3", "video", ".mkv"),
)
_BYTES = (bytes, bytearray, memoryview)
_LONGEST_TIMEOUT = 10**8
_MEDIA_FORMS = "must be a path, bytes, (filename, bytes), or a list of those"


@dataclass(frozen=True)
class Form:
    """A request ready to be sent; `timeout` is in seconds."""

    body: bytes
    content_type: str
    stream: bool
    request_id: str | None
    timeout: float | None


def make_form(
    *,
    text: str | None,
    images: Any,
    audio: Any,
    video: Any,
    output_modalities: Sequence[str] | None,
    input_modalities: Sequence[str] | None,
    stream: bool,
    request_id: str | None,
    timeout: float | None = None,
    **model_kwargs: Any,
) -> Form:
    """Check the arguments of `generate` as far as that is possible without the model, and put them
    in a form.

    Files go out in the order of `input_modalities`. Without it the order is images, audio, video,
    text, and `input_modalities` says so where there are several kinds, or videos, which may be
    images that move.

    Raises:
        InvalidRequest: a wrong type, a file that cannot be read, a value that JSON cannot hold, or
            nothing at all.
    """
    if text is not None and not isinstance(text, str):
        raise InvalidRequest("text", text, "must be a string")
    if request_id is not None and (not isinstance(request_id, str) or not request_id):
        raise InvalidRequest("request_id", request_id, "must be a string that is not empty")
    limit = None if timeout is None else seconds("timeout", timeout)
    order = _names("input_modalities", input_modalities)
    outputs = _names("output_modalities", output_modalities)
    files = [
        (kind, *_file(kind, index, item))
        for kind, given in zip(_MEDIA, (images, audio, video), strict=True)
        for index, item in enumerate(_as_list(given))
    ]
    model_kwargs = {name: value for name, value in model_kwargs.items() if value is not None}
    if text is None and not files and "messages" not in model_kwargs:
        raise InvalidRequest("text", None, "nothing was given")
    if order is not None:
        files = _ordered(files, order)
    else:
        kinds = [kind for kind, _, _ in files] + ["text"] * (text is not None)
        order = kinds if len(set(kinds)) > 1 or "video" in kinds else None
    fields = {
        "text": text,
        "input_modalities": order and ",".join(order),
        "output_modalities": outputs and ",".join(outputs),
        "streaming": "true" if stream else "false",
        "request_id": request_id,
        "model_kwargs": _as_json(model_kwargs) if model_kwargs else None,
    }
    body, content_type = _encode(fields, files)
    return Form(body, content_type, bool(stream), request_id, limit)


def _names(field: str, value: Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, AbstractSet)) or not names:
        raise InvalidRequest(field, value, "must be a list of modalities that is not empty")
    if not all(isinstance(name, str) and name and "," not in name for name in names):
        raise InvalidRequest(field, value, "must be a list of names of modalities")
    return list(names)


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return given if isinstance(given, list) else [given]


def _ordered(files: list[tuple], order: list[str]) -> list[tuple]:
    """The files, each where its kind is named; those never named come last."""
    left, placed = list(files), []
    for kind in order:
        match = next((file for file in left if file[0] == kind), None)
        if match is not None:
            placed.append(match)
            left = [file for file in left if file is not match]
    return placed + left


def _file(kind: str, index: int, item: Any) -> tuple[str, bytes]:
    """Name and content of one piece of media. The name's suffix tells its kind."""
    name, data = _content(_FIELD_OF[kind], item, f"{kind}{index}")
    known = any(name.lower().endswith(suffixes) for suffixes in _SUFFIXES.values())
    return name if known else name + _suffix(kind, data), data


def _content(field: str, item: Any, name: str) -> tuple[str, bytes]:
    """Name and bytes of a path, of bytes, or of `(filename, bytes)`."""
    if isinstance(item, (str, os.PathLike)):
        path = Path(item)
        try:
            return path.name, path.read_bytes()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise InvalidRequest(field, str(item), f"cannot be read: {why}") from None
    if _is_named(item):
        name, item = os.fspath(item[0]), item[1]
    if not isinstance(item, _BYTES):
        allowed = f"{_MEDIA_FORMS}; only an Engine in this process takes images and arrays"
        raise InvalidRequest(field, item, allowed)
    return name, bytes(item)


def _is_named(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], (str, os.PathLike))


def _data_url(name: str, data: bytes) -> str:
    content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return f"data:{content_type};base64,{base64.b64encode(data).decode()}"


def _suffix(kind: str, data: bytes) -> str:
    """The suffix that fits the content, of those that this kind has; images may be videos."""
    kinds = ("video", "image") if kind == "video" else (kind,)
    for offset, magic, of_kind, suffix in _MAGIC:
        if of_kind in kinds and data.startswith(magic, offset):
            return suffix
    return _SUFFIXES[kind][0]


def _encode(fields: Mapping[str, str | None], files: list[tuple]) -> tuple[bytes, str]:
    from urllib3.filepost import encode_multipart_formdata

    parts: list[tuple[str, Any]] = []
    for name, value in fields.items():
        if value is not None:
            try:
                parts.append((name, value.encode()))
            except UnicodeEncodeError:
                raise InvalidRequest(name, value, "is not valid Unicode") from None
    for _, name, data in files:
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        name = name.encode("utf-8", "replace").decode()
        parts.append(("files", (name, data, content_type)))
    return encode_multipart_formdata(parts)


def _as_json(model_kwargs: dict[str, Any]) -> str:
    if "messages" in model_kwargs:
        messages = _plain("messages", model_kwargs["messages"], media=True)
        model_kwargs = {**model_kwargs, "messages": messages}
    return json.dumps({name: _plain(name, value) for name, value in model_kwargs.items()})


def _plain(field: str, value: Any, *, media: bool = False) -> Any:
    """`value` of types that JSON has: arrays become lists, numbers of numpy become numbers, and
    files (`pathlib.Path`, bytes, `(filename, bytes)`) become data URLs of what they hold.

    Args:
        field: for messages of errors.
        media: parts of chat messages may hold media; they become data URLs.
    """
    if hasattr(value, "tolist"):  # an array, or a number of numpy
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise InvalidRequest(field, value, "must be finite")
    if isinstance(value, Mapping):
        if media and value.get("type") in _MEDIA and value["type"] in value:
            return _url_part(value)
        return {str(key): _plain(field, item, media=media) for key, item in value.items()}
    if isinstance(value, (*_BYTES, Path)) or (_is_named(value) and isinstance(value[1], _BYTES)):
        return _data_url(*_content(field, value, field))
    if isinstance(value, (list, tuple, AbstractSet)):
        return [_plain(field, item, media=media) for item in value]
    raise InvalidRequest(field, value, f"JSON has no form for {type(value).__name__}")


def _url_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """`{"type": "image", "image": media}` with the media inside, in OpenAI's form."""
    kind = part["type"]
    item = part[kind]
    if isinstance(item, str) and item.startswith(("data:", "http://", "https://")):
        url = item
    else:
        url = _data_url(*_file(kind, 0, item))
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def seconds(field: str, timeout: Any) -> float:
    """A checked number of seconds."""
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not 0 < timeout <= _LONGEST_TIMEOUT:
        allowed = f"must be seconds above 0, at most {_LONGEST_TIMEOUT}"
        raise InvalidRequest(field, timeout, allowed)
    return float(timeout)
