"""From OpenAI's words for an image to the parameters of a model, and back for its refusals."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mstar.errors import InvalidRequest
from mstar.http.errors import saying
from mstar.http.openai.common import unsupported
from mstar.http.openai.images_surface import ImagesSurface, fitted
from mstar.models.card import ModelCard

__all__ = ["Params", "Uploads", "params_of", "seeds_of"]

_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Uploads:
    """The images to edit, in order, the size of the first, and the mask."""

    images: Sequence[bytes] = ()
    size: tuple[int, int] | None = None
    mask: bytes | None = None


@dataclass
class Params:
    """Parameters of the model for one request, without a seed.

    Args:
        values: by name or alias, as `Engine.submit` takes them.
        whole: what the model makes of them: all by name, checked, with defaults.
        words: field of the engine -> OpenAI's field that it came from, and its value.
        size: of the image, `None` where that is the model's matter.
        every: after how many steps a preview is made; 0 if none is.
    """

    values: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    words: dict[str, tuple[str, Any]] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    every: int = 0

    def put(self, name: str, value: Any, word: str, said: Any) -> None:
        """Set a parameter that stands for what the client said in `word`."""
        self.values[name], self.words[name] = value, (word, said)

    def in_words(self, error: InvalidRequest) -> InvalidRequest:
        """A refusal of the engine, told about the field that the client sent."""
        if error.field not in self.words:
            return error
        word, said = self.words[error.field]
        allowed = error.allowed if word == error.field else saying(error)
        return type(error)(word, said, allowed)


def params_of(
    card: ModelCard,
    surface: ImagesSurface,
    fields: dict[str, Any],
    extras: dict[str, Any],
    uploads: Uploads | None,
) -> Params:
    """Parameters for checked fields.

    Args:
        fields: OpenAI's, as far as they are given.
        extras: parameters that the client gave by their own names.
        uploads: of an edit.

    Raises:
        Refused, InvalidRequest: the model does not have such images.
    """
    _check_reserved(card, surface, extras)
    given = {card.parameters[name].name for name in extras}
    params = Params()
    params.words["text"] = ("prompt", f"{len(fields['prompt'])} characters")
    params.words["images"] = ("image", None)
    for name, pixels in _edges(card, surface, fields, given, uploads).items():
        params.put(name, pixels, "size", fields.get("size"))
    if uploads is not None and uploads.mask is not None:
        params.put(surface.mask, uploads.mask, "mask", f"{len(uploads.mask)} bytes")
    params.values |= extras
    params.words |= {
        card.parameters[name].name: (name, value)
        for name, value in extras.items()
        if card.parameters[name].name != name
    }
    try:
        params.whole = card.parameters.validate(params.values)
    except InvalidRequest as error:
        raise params.in_words(error) from None
    if surface.width is not None and surface.height is not None:
        width, height = params.whole[surface.width], params.whole[surface.height]
        params.size = None if width is None or height is None else (width, height)
    partial = fields.get("partial_images", 0)
    if partial and surface.previews is not None:
        steps = params.whole[surface.steps] - surface.fewer_steps if surface.steps else 0
        params.every = max(1, (steps - 1) // partial)
        params.put(surface.previews, params.every, "partial_images", partial)
    return params


def seeds_of(
    card: ModelCard, surface: ImagesSurface, params: Params, n: int
) -> list[dict[str, Any]]:
    """The parameters of each of `n` images: the given seed and those after it, or new ones.

    Raises:
        InvalidRequest: a seed is too large, or all would have the same noise.
    """
    if n > 1 and params.whole.get("latents") is not None:
        raise InvalidRequest("latents", "given", f"are the noise of one image, and n={n}")
    if surface.seed is None:
        return [params.values] * n
    others, given = {}, False
    for name, value in params.values.items():
        if card.parameters[name].name == surface.seed:
            given = True
        else:
            others[name] = value
    parameter = card.parameters[surface.seed]
    first = params.whole[surface.seed] if given else None
    if first is None:
        most = 2**31 if parameter.high is None else min(2**31, int(parameter.high))
        first = secrets.randbelow(max(1, most - n))
    parameter.check(first + n - 1)
    return [{**others, surface.seed: first + index} for index in range(n)]


def _check_reserved(card: ModelCard, surface: ImagesSurface, extras: dict[str, Any]) -> None:
    """Parameters that OpenAI's fields speak for are not set beside them."""
    taken = {surface.previews: "stream and partial_images", surface.mask: "mask", "num_images": "n"}
    for name, value in extras.items():
        word = taken.get(card.parameters[name].name)
        if word is not None:
            raise InvalidRequest(name, value, f"is not set here; use {word}")


def _edges(
    card: ModelCard,
    surface: ImagesSurface,
    fields: dict[str, Any],
    given: set[str],
    uploads: Uploads | None,
) -> dict[str, int]:
    """Width and height for `size`, as far as they are not given by their own names."""
    size = fields.get("size", "auto")
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None and size != "auto":
        raise InvalidRequest("size", size, "must be WIDTHxHEIGHT in pixels, or auto")
    if surface.width is None or surface.height is None:
        if match is not None:
            raise unsupported("size", size, f"{card.name} makes images of one size only; use auto")
        return {}
    both = {surface.width, surface.height} & given
    if match is not None and both:
        names = " and ".join(sorted(both))
        raise InvalidRequest("size", size, f"give either size or {names}, not both")
    if match is not None:
        found = int(match[1]), int(match[2])
    elif uploads is not None and uploads.size is not None and surface.keeps_size:
        found = fitted(card, surface, *uploads.size)
    else:
        found = surface.size
    if found is None:
        return {}
    edges = {surface.width: found[0], surface.height: found[1]}
    return {name: pixels for name, pixels in edges.items() if name not in both}
