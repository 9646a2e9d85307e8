"""The bodies of the images routes, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from mstar.io.image import FORMATS

__all__ = ["EDIT", "GENERATION"]

_STRING = {"type": "string"}
_FILE = {**_STRING, "format": "binary"}
_FIELDS: dict[str, Any] = {
    "model": _STRING,
    "prompt": {**_STRING, "minLength": 1, "maxLength": 32000},
    "n": {"type": "integer", "minimum": 1, "maximum": 10, "default": 1},
    "size": {**_STRING, "default": "auto", "description": "WIDTHxHEIGHT or auto"},
    "quality": {
        **_STRING,
        "enum": ["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"],
        "default": "auto",
        "description": "echoed; changes nothing unless the model has qualities",
    },
    "background": {**_STRING, "enum": ["auto", "opaque"], "default": "auto"},
    "output_format": {**_STRING, "enum": list(FORMATS), "default": "png"},
    "output_compression": {
        "type": "integer",
        "minimum": 0,
        "maximum": 100,
        "default": 100,
        "description": "quality of jpeg and webp",
    },
    "response_format": {**_STRING, "enum": ["b64_json", "url"], "default": "b64_json"},
    "stream": {"type": "boolean", "default": False},
    "partial_images": {
        "type": "integer",
        "minimum": 0,
        "maximum": 3,
        "default": 0,
        "description": "previews in a stream, where the model makes any",
    },
    "user": _STRING,
}
_IMAGE_URL = {
    "anyOf": [_STRING, {"type": "object", "properties": {"image_url": _STRING}}],
}
_FORM = {
    "type": "object",
    "required": ["prompt", "image"],
    "properties": {
        **_FIELDS,
        "image": {"type": "array", "items": _FILE, "maxItems": 16},
        "mask": {**_FILE, "description": "PNG of the first image's size; alpha 0 is edited"},
        "input_fidelity": {**_STRING, "enum": ["low", "high"], "default": "low"},
    },
}
_EDIT_JSON = {
    "type": "object",
    "required": ["prompt", "images"],
    "properties": {
        **_FIELDS,
        "images": {"type": "array", "items": _IMAGE_URL, "maxItems": 16},
        "mask": _IMAGE_URL,
        "input_fidelity": {**_STRING, "enum": ["low", "high"], "default": "low"},
    },
}
_JSON = {"type": "object", "required": ["prompt"], "properties": _FIELDS}

GENERATION = {"application/json": {"schema": _JSON}}
EDIT = {
    "multipart/form-data": {"schema": _FORM},
    "application/json": {"schema": _EDIT_JSON},
}
