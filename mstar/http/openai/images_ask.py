"""The fields of the images routes, checked, as arguments of `Engine.submit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mstar.errors import InvalidRequest
from mstar.http.fields import check_text, deadline
from mstar.http.front import Front
from mstar.http.openai.common import flat, model_parameters, unsupported
from mstar.http.openai.images_fields import EDIT_FIELDS, FIELDS, KNOWN, QUALITIES, UNSUPPORTED
from mstar.http.openai.images_params import Params, Uploads, params_of, seeds_of
from mstar.http.openai.images_surface import ImagesSurface
from mstar.http.openai.models import check_model
from mstar.models.card import ModelCard

__all__ = ["ImagesAsk", "ask_of"]

_LONGEST_PROMPT = 32_000


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
    read = _read(card, fields, edit=uploads is not None)
    prompt = _prompt(front, fields)
    extras = model_parameters(card, fields, (*KNOWN, *UNSUPPORTED))
    params = params_of(card, surface, fields, extras, uploads)
    common = {
        "text": prompt,
        "output_modalities": ("image",),
        "stream": read["stream"],
        "timeout": deadline(front.settings, header, fields.get("timeout")),
    }
    if uploads is not None:
        common["images"] = list(uploads.images)
        common["input_modalities"] = ("image",) * len(uploads.images) + ("text",)
    return ImagesAsk(
        requests=[{**common, **one} for one in seeds_of(card, surface, params, read["n"])],
        params=params,
        format=read["output_format"],
        compression=read["output_compression"],
        quality=QUALITIES[read["quality"]],
        url=read["response_format"] == "url",
        stream=read["stream"],
        partial_images=read["partial_images"] if params.every else 0,
    )


def _read(card: ModelCard, fields: dict[str, Any], *, edit: bool) -> dict[str, Any]:
    """The values of `FIELDS`; what they ask for, and no model or route has, is refused."""
    for field in UNSUPPORTED:
        if field in fields:
            raise unsupported(field, None, f"{card.name} does not have it")
    if not edit:
        for field in EDIT_FIELDS:
            if field in fields:
                raise unsupported(field, None, "is for POST /v1/images/edits")
    read = {name: field.check(fields.get(name, field.default)) for name, field in FIELDS.items()}
    stream, url = read["stream"], read["response_format"] == "url"
    if read["input_fidelity"] != "low":
        raise unsupported("input_fidelity", read["input_fidelity"], f"{card.name} has low only")
    if read["background"] == "transparent":
        raise unsupported("background", "transparent", f"{card.name} makes opaque images only")
    if read["output_format"] == "png" and read["output_compression"] != 100:
        allowed = "png is always lossless; use jpeg or webp"
        raise unsupported("output_compression", read["output_compression"], allowed)
    if read["partial_images"] and not stream:
        raise InvalidRequest("partial_images", read["partial_images"], "needs stream=true")
    if stream and read["n"] > 1:
        raise unsupported("n", read["n"], "one image can be streamed at a time")
    if stream and url:
        raise unsupported("response_format", "url", "images are streamed as b64_json only")
    return read


def _prompt(front: Front, fields: dict[str, Any]) -> str:
    prompt = fields.get("prompt")
    if not isinstance(prompt, str):
        raise InvalidRequest("prompt", prompt, "must be the text that tells what to draw")
    if len(prompt) > _LONGEST_PROMPT:
        allowed = f"must be at most {_LONGEST_PROMPT} characters"
        raise InvalidRequest("prompt", f"{len(prompt)} characters", allowed)
    return check_text("prompt", prompt, front.settings)
