"""Forms of the images routes: every value arrives as text or as a file, and gets its type here."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mstar.errors import InvalidRequest
from mstar.http.body import Part, check_marks, whole_json
from mstar.http.errors import Refused
from mstar.http.openai.images_ask import KNOWN, UNSUPPORTED
from mstar.models.card import ModelCard

__all__ = ["EditForm", "read_edit_form"]

_INTEGERS = ("n", "output_compression", "partial_images")
_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,9}\s*")
_NESTED = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")  # name[] and name[key]


@dataclass
class EditForm:
    """The fields of a form, typed, and its files."""

    fields: dict[str, Any] = field(default_factory=dict)
    images: list[bytes] = field(default_factory=list)
    masks: list[bytes] = field(default_factory=list)


def read_edit_form(card: ModelCard, parts: Sequence[Part]) -> EditForm:
    """Take a form apart: files come as `image`, `image[]` and `mask`, what is no field of OpenAI's
    is a parameter of the model; lists and objects are JSON, or come as `name[]` and `name[key]`.

    Raises:
        Refused, InvalidRequest: a field is given twice, or is not text.
    """
    form = EditForm()
    for part in parts:
        if part.name in ("image", "image[]"):
            form.images.append(part.data)
        elif part.name == "mask":
            form.masks.append(part.data)
        else:
            _read(card, form.fields, part)
    return form


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
    if name in KNOWN:
        return _known(name, part.text())
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


def _known(name: str, text: str) -> Any:
    if not text and name != "prompt":
        return None
    if name in _INTEGERS and _WHOLE.fullmatch(text):
        return int(text)
    if name == "stream":
        return _BOOLS.get(text.strip().lower(), text)
    return text


def _json_or_text(text: str) -> Any:
    check_marks(text, "the form")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
