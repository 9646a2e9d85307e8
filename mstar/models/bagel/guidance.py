"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) by text and by image, renormed.

Three velocities are mixed: that of everything, that without the last text, that without images.
The arithmetic is in `engine/kernels/guided_euler.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.engine.kernels.staging import to_device

__all__ = ["UNGUIDED", "Guidance", "guidance_table"]


@dataclass(frozen=True)
class Guidance:
    """How one request is guided.

    Args:
        text_scale: at most 1 is no guidance at all.
        image_scale: at most 1 is none by images.
        renorm: how lengths are compared, over the whole image ("global") or of each token
            ("channel"); "text_channel" renorms what text guidance makes and leaves what image
            guidance adds.
        renorm_min: how far velocities may be shortened; 1 means not at all.
    """

    text_scale: float = 1.0
    image_scale: float = 1.0
    renorm: str = "global"
    renorm_min: float = 0.0

    @property
    def by_text(self) -> bool:
        """Whether the velocity without text is needed."""
        return self.text_scale > 1

    @property
    def by_image(self) -> bool:
        """Whether the velocity without images is needed; never without that of text."""
        return self.by_text and self.image_scale > 1


UNGUIDED = Guidance()


def guidance_table(
    guidance: Sequence[Guidance], dt: Sequence[float], device: torch.device | str = "cpu"
) -> Tensor:
    """What `guided_euler` wants to know of each request: float32 `[requests, 8]`."""
    numbers = [
        float(number)
        for each, step in zip(guidance, dt, strict=True)
        for number in (
            step,
            each.text_scale,
            each.image_scale,
            each.renorm_min,
            each.by_text,
            each.by_image,
            each.renorm == "global",
            each.renorm == "text_channel",
        )
    ]
    return to_device(numbers, torch.float32, torch.device(device)).view(len(dt), -1)
