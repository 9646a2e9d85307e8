"""OpenAI's fields of the images routes: their ranges, and the bodies for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from mstar.http.openai.common import schema_of
from mstar.io.image import FORMATS
from mstar.models.parameters import Parameter

__all__ = ["EDIT", "EDIT_FIELDS", "FIELDS", "GENERATION", "KNOWN", "QUALITIES", "UNSUPPORTED"]

# Quality -> how it is echoed: OpenAI's replies know five words only.
QUALITIES = {word: word for word in ("low", "medium", "high", "xhigh", "max")}
QUALITIES |= {"auto": "medium", "standard": "medium", "hd": "high"}
FIELDS = {
    field.name: field
    for field in (
        Parameter("n", int, 1, low=1, high=10),
        Parameter("quality", str, "auto", choices=tuple(QUALITIES)),
        Parameter("output_format", str, "png", choices=tuple(FORMATS)),
        Parameter("output_compression", int, 100, low=0, high=100),
        Parameter("response_format", str, "b64_json", choices=("b64_json", "url")),
        Parameter("stream", bool, False),
        Parameter("partial_images", int, 0, low=0, high=3),
        Parameter("style", str, "vivid", choices=("vivid", "natural")),
        Parameter("moderation", str, "auto", choices=("auto", "low")),
        Parameter("input_fidelity", str, "low", choices=("low", "high")),
        Parameter("background", str, "auto", choices=("auto", "opaque", "transparent")),
    )
}
# OpenAI's fields that only edits have.
EDIT_FIELDS = ("image", "images", "mask", "input_fidelity")
KNOWN = (*FIELDS, *EDIT_FIELDS, "model", "prompt", "size", "timeout")
# OpenAI's fields that need what no model here has.
UNSUPPORTED = ("markup", "svg", "complexity", "frame_count", "frame_duration_ms", "prompt_rewriter")

_STRING = {"type": "string"}
_FILE = {**_STRING, "format": "binary"}
_IMAGE_URL = {"anyOf": [_STRING, {"type": "object", "properties": {"image_url": _STRING}}]}
_EDITED = {
    "model": _STRING,
    "prompt": {**_STRING, "minLength": 1, "maxLength": 32000},
    "size": {**_STRING, "default": "auto", "description": "WIDTHxHEIGHT or auto"},
    **schema_of(FIELDS.values()),
    "user": _STRING,
}
_DRAWN = {name: schema for name, schema in _EDITED.items() if name not in EDIT_FIELDS}


def _body(required: tuple[str, ...], properties: dict[str, Any]) -> dict[str, Any]:
    return {"schema": {"type": "object", "required": required, "properties": properties}}


def _edit(name: str, image: dict[str, Any]) -> dict[str, Any]:
    images = {"type": "array", "items": image, "maxItems": 16}
    return _body(("prompt", name), {**_EDITED, name: images, "mask": image})


GENERATION = {"application/json": _body(("prompt",), _DRAWN)}
EDIT = {
    "multipart/form-data": _edit("image", _FILE),
    "application/json": _edit("images", _IMAGE_URL),
}
