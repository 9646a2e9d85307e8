"""The sizes that images are brought to before they become tokens."""

from __future__ import annotations

from dataclasses import dataclass

from mstar.models.fields import check_sizes

__all__ = ["ResizeRule", "new_size"]

_MAX_PIXELS = 14 * 14 * 9 * 1024  # as published, for both kinds of image tokens


@dataclass(frozen=True)
class ResizeRule:
    """To which size an image is brought.

    Args:
        max_size, min_size: of a side, in pixels.
        stride: sides are multiples of it.
        max_pixels: of the whole image.

    Raises:
        ValueError: no image can be brought to that.
    """

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = _MAX_PIXELS

    def __post_init__(self) -> None:
        check_sizes(vars(self), vars(self))
        if self.max_size % self.stride:
            raise ValueError(f"max_size={self.max_size}: must be a multiple of {self.stride}")
        if self.min_size > self.max_size:
            raise ValueError(f"min_size={self.min_size}: must not exceed max_size={self.max_size}")
        if self.max_pixels < self.stride**2:
            raise ValueError(f"max_pixels={self.max_pixels}: must hold a square of {self.stride}")


def new_size(rule: ResizeRule, width: int, height: int) -> tuple[int, int]:
    """Width and height that a rule brings an image to.

    The long side is at most `max_size`, the short one `min_size` or more if that leaves room for
    it, and both are multiples of the stride.
    """

    def scaled(width: int, height: int, scale: float) -> tuple[int, int]:
        return snapped(round(width * scale)), snapped(round(height * scale))

    def snapped(side: int) -> int:
        return max(rule.stride, round(side / rule.stride) * rule.stride)

    scale = min(rule.max_size / max(width, height), 1.0)
    scale = max(scale, rule.min_size / min(width, height))
    width, height = scaled(width, height, scale)
    if width * height > rule.max_pixels:  # a ratio of areas, for sides: it shrinks more than needed
        width, height = scaled(width, height, rule.max_pixels / (width * height))
    if max(width, height) > rule.max_size:
        width, height = scaled(width, height, rule.max_size / max(width, height))
    return width, height
