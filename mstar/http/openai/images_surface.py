"""How a model's images are asked for: OpenAI's words and the parameters that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter

__all__ = ["ImagesSurface", "fitted", "images_of"]

_USUAL = 1024  # pixels along each edge, where neither the request nor the model says


@dataclass(frozen=True)
class ImagesSurface:
    """The images routes of one model. Names are those of its parameters, `None` where it has none.

    Args:
        width, height: of the image, in pixels.
        seed: of the noise; the images of one request get seeds that follow each other.
        steps: how many steps an image takes.
        fewer_steps: how many fewer are walked than `steps` says.
        previews: a preview is made every so many steps.
        mask: a PNG whose transparent pixels are to be changed.
        size: width and height of `auto`; `None` leaves it to the model.
        edits: whether images can be given.
        keeps_size: whether `auto` is the size of the first image in an edit, brought into range.
    """

    width: str | None = "width"
    height: str | None = "height"
    seed: str | None = "seed"
    steps: str | None = "steps"
    fewer_steps: int = 0
    previews: str | None = "preview_every"
    mask: str | None = "mask"
    size: tuple[int, int] | None = None
    edits: bool = True
    keeps_size: bool = True


def images_of(card: ModelCard) -> ImagesSurface | None:
    """What the card alone tells; `None` unless it makes images of text."""
    if "text" not in card.inputs or "image" not in card.outputs:
        return None
    parameters = card.parameters

    def there(*names: str) -> str | None:
        return next((parameters[name].name for name in names if name in parameters), None)

    width, height = there("width"), there("height")
    size = None
    if width is not None and height is not None:
        size = (_edge(parameters[width]), _edge(parameters[height]))
    return ImagesSurface(
        width=width,
        height=height,
        seed=there("seed"),
        steps=there("num_timesteps", "num_inference_steps", "steps"),
        previews=there("preview_every"),
        mask=there("mask"),
        size=size,
        edits="image" in card.inputs,
    )


def fitted(card: ModelCard, surface: ImagesSurface, width: int, height: int) -> tuple[int, int]:
    """The size nearest to this one, with its proportions as far as may be, that is in the range
    of the model's parameters."""
    edges = (card.parameters[surface.width], card.parameters[surface.height])
    given = (width, height)
    down = min([p.high / edge for p, edge in zip(edges, given, strict=True) if p.high], default=1)
    up = max([p.low / edge for p, edge in zip(edges, given, strict=True) if p.low], default=1)
    scale = min(max(1.0, up), down)
    return tuple(
        _inside(parameter, int(edge * scale)) for parameter, edge in zip(edges, given, strict=True)
    )


def _edge(parameter: Parameter) -> int:
    return parameter.default or _inside(parameter, _USUAL)


def _inside(parameter: Parameter, edge: int) -> int:
    if parameter.low is not None:
        edge = max(edge, int(parameter.low))
    return edge if parameter.high is None else min(edge, int(parameter.high))
