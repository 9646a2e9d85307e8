"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) by text and by image, renormed.

Three velocities are mixed: that of everything, that without the last text, that without images.
Strong guidance makes velocities long; the mix is brought back to the length of the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RENORMS", "Guidance", "guidance_table", "guided_velocity"]

# How lengths are compared: over the whole image, or of each token; "text_channel" renorms what
# text guidance makes and leaves what image guidance adds.
RENORMS = ("global", "channel", "text_channel")
_TINY = 1e-8


@dataclass(frozen=True)
class Guidance:
    """How one request is guided.

    Args:
        text_scale: at most 1 is no guidance at all.
        image_scale: at most 1 is none by images.
        renorm: one of `RENORMS`.
        renorm_min: how far velocities may be shortened; 1 means not at all.

    Raises:
        ValueError: `renorm` is another one.
    """

    text_scale: float = 1.0
    image_scale: float = 1.0
    renorm: str = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        if self.renorm not in RENORMS:
            raise ValueError(f"renorm={self.renorm!r}: must be one of {', '.join(RENORMS)}")

    @property
    def by_text(self) -> bool:
        """Whether the velocity without text is needed."""
        return self.text_scale > 1

    @property
    def by_image(self) -> bool:
        """Whether the velocity without images is needed; never without that of text."""
        return self.by_text and self.image_scale > 1


def guidance_table(guidance: Sequence[Guidance], device: torch.device | str = "cpu") -> Tensor:
    """What `guided_velocity` wants to know of each request: float32 `[requests, 7]`."""
    rows = [
        (
            each.text_scale,
            each.image_scale,
            each.renorm_min,
            each.by_text,
            each.by_image,
            each.renorm == "global",
            each.renorm == "text_channel",
        )
        for each in guidance
    ]
    return torch.tensor(rows, dtype=torch.float32).to(device, non_blocking=True)


def guided_velocity(main: Tensor, text: Tensor, image: Tensor, table: Tensor) -> Tensor:
    """Velocities float32 `[requests, tokens, dim]` of images of one size.

    Args:
        main: with everything, `[requests, tokens, dim]`.
        text: without text, of the same shape; `main` again where that is not needed.
        image: without images; `main` again where that is not needed, or where there are none.
        table: how each request is guided, from `guidance_table`.
    """
    main, text, image = main.float(), text.float(), image.float()
    columns = table.view(len(table), -1, 1, 1).unbind(1)  # each [requests, 1, 1]
    text_scale, image_scale, least = columns[:3]
    by_text, by_image, whole, text_only = (column.bool() for column in columns[3:])
    mixed = text + text_scale * (main - text)
    mixed = torch.where(by_image & ~text_only, image + image_scale * (mixed - image), mixed)
    mixed = mixed * _ratio(main, mixed, whole).maximum(least).clamp(max=1.0)
    mixed = torch.where(by_image & text_only, image + image_scale * (mixed - image), mixed)
    return torch.where(by_text, mixed, main)


def _ratio(main: Tensor, mixed: Tensor, whole: Tensor) -> Tensor:
    """By how much `main` is longer, `[requests, tokens, 1]`: of images where `whole`, or tokens."""
    of_tokens = _length(main, -1) / (_length(mixed, -1) + _TINY)
    of_images = _length(main, (1, 2)) / (_length(mixed, (1, 2)) + _TINY)
    return torch.where(whole, of_images, of_tokens)


def _length(x: Tensor, over: int | tuple[int, int]) -> Tensor:
    return torch.linalg.vector_norm(x, dim=over, keepdim=True)
