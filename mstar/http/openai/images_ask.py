"""The fields of the images routes, checked, as arguments of `Engine.submit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mstar.errors import InvalidRequest
from mstar.http.fields import check_text, deadline
from mstar.http.front import Front
from mstar.http.openai.common import flat, model_parameters, unsupported
from mstar.http.openai.images_params import Params, Uploads, params_of, seeds_of
from mstar.http.openai.images_surface import ImagesSurface
from mstar.http.openai.models import check_model
from mstar.io.image import FORMATS
from mstar.models.card import ModelCard

__all__ = ["EDIT_FIELDS", "KNOWN", "UNSUPPORTED", "ImagesAsk", "ask_of"]

# OpenAI's fields that only edits have.
EDIT_FIELDS = ("image", "images", "mask", "input_fidelity")
KNOWN = (
    *("model", "prompt", "n", "size", "quality", "style", "moderation", "background"),
    *("output_format", "output_compression", "response_format", "stream", "partial_images"),
    *("timeout", *EDIT_FIELDS),
)
# OpenAI's fields that need what no model here has.
UNSUPPORTED = ("markup", "svg", "complexity", "frame_count", "frame_duration_ms", "prompt_rewriter")
_LONGEST_PROMPT = 32_000
_MOST_IMAGES = 10
_MOST_PARTIAL = 3
# Quality -> how it is echoed: OpenAI's replies know five words only.
_QUALITIES = {word: word for word in ("low", "medium", "high", "xhigh", "max")}
_QUALITIES |= {"auto": "medium", "standard": "medium", "hd": "high"}


@dataclass
class ImagesAsk:
    """A request, read.

    Args:
        requests: arguments of `Engine.submit`, once per image.
        params: where they came from.
        format: of the files, one of `FORMATS`.
        compression: quality of JPEG and WebP, 0 to 100.
        quality: as it is echoed.
        url: whether the files are kept and their URLs sent.
        stream: whether events are sent.
        partial_images: how many of them come before the last one.
    """

    requests: list[dict[str, Any]]
    params: Params
    format: str = "png"
    compression: int = 100
    quality: str = "medium"
    url: bool = False
    stream: bool = False
    partial_images: int = 0


def ask_of(
    front: Front,
    surface: ImagesSurface,
    fields: dict[str, Any],
    uploads: Uploads | None = None,
    header: str | None = None,
) -> ImagesAsk:
    """Read the fields of one request.

    Args:
        front, surface: see there.
        fields: by name, typed; `None` means that a field was not given.
        uploads: of an edit.
        header: the deadline that came as a header.

    Raises:
        Refused, InvalidRequest: a field is not what it must be, or cannot be honoured.
    """
    card = front.card
    fields = flat(fields)
    if "model" in fields:
        check_model(front, fields["model"])
    _check_known(card, fields, edit=uploads is not None)
    prompt = _prompt(front, fields)
    n = _integer(fields, "n", 1, 1, _MOST_IMAGES)
    quality = _choice(fields, "quality", "auto", _QUALITIES)
    format = _choice(fields, "output_format", "png", FORMATS)
    compression = _integer(fields, "output_compression", 100, 0, 100)
    if format == "png" and compression != 100:
        allowed = "png is always lossless; use jpeg or webp"
        raise unsupported("output_compression", compression, allowed)
    url = _choice(fields, "response_format", "b64_json", ("b64_json", "url")) == "url"
    stream, partial = _streaming(fields, n, url)
    extras = model_parameters(card, fields, (*KNOWN, *UNSUPPORTED))
    params = params_of(card, surface, fields, extras, uploads)
    common = {
        "text": prompt,
        "output_modalities": ("image",),
        "stream": stream,
        "timeout": deadline(front.settings, header, fields.get("timeout")),
    }
    if uploads is not None:
        common["images"] = list(uploads.images)
        common["input_modalities"] = ("image",) * len(uploads.images) + ("text",)
    return ImagesAsk(
        requests=[{**common, **one} for one in seeds_of(card, surface, params, n)],
        params=params,
        format=format,
        compression=compression,
        quality=_QUALITIES[quality],
        url=url,
        stream=stream,
        partial_images=partial if params.every else 0,
    )


def _check_known(card: ModelCard, fields: dict[str, Any], *, edit: bool) -> None:
    """Fields whose values are checked and change nothing, or can change nothing and are refused."""
    name = card.name
    for field in UNSUPPORTED:
        if field in fields:
            raise unsupported(field, None, f"{name} does not have it")
    if not edit:
        for field in EDIT_FIELDS:
            if field in fields:
                raise unsupported(field, None, "is for POST /v1/images/edits")
    _choice(fields, "style", "vivid", ("vivid", "natural"))
    _choice(fields, "moderation", "auto", ("auto", "low"))
    _choice(fields, "input_fidelity", "low", ("low", "high"))
    background = _choice(fields, "background", "auto", ("auto", "opaque", "transparent"))
    if background == "transparent":
        raise unsupported("background", background, f"{name} makes opaque images only")


def _prompt(front: Front, fields: dict[str, Any]) -> str:
    prompt = fields.get("prompt")
    if not isinstance(prompt, str):
        raise InvalidRequest("prompt", prompt, "must be the text that tells what to draw")
    if len(prompt) > _LONGEST_PROMPT:
        allowed = f"must be at most {_LONGEST_PROMPT} characters"
        raise InvalidRequest("prompt", f"{len(prompt)} characters", allowed)
    return check_text("prompt", prompt, front.settings)


def _streaming(fields: dict[str, Any], n: int, url: bool) -> tuple[bool, int]:
    stream = fields.get("stream", False)
    if not isinstance(stream, bool):
        raise InvalidRequest("stream", stream, "must be true or false")
    partial = _integer(fields, "partial_images", 0, 0, _MOST_PARTIAL)
    if partial and not stream:
        raise InvalidRequest("partial_images", partial, "needs stream=true")
    if stream and n > 1:
        raise unsupported("n", n, "one image can be streamed at a time")
    if stream and url:
        raise unsupported("response_format", "url", "images are streamed as b64_json only")
    return stream, partial


def _integer(fields: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(name, value, f"must be an integer from {low} to {high}")
    return value


def _choice(fields: dict[str, Any], name: str, default: str, allowed: Any) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str) or value not in allowed:
        raise InvalidRequest(name, value, f"must be one of {', '.join(allowed)}")
    return value
