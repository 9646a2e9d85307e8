"""How SNAC's tensors are stored: weight-normalised, under one of three namings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mstar.engine.weights import Source

__all__ = ["as_stored", "fold", "folded"]

_NAMINGS = (
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ("weight_g", "weight_v"),
    ("weight",),
)


def as_stored(name: str, arrange: Callable[[Tensor], Tensor]) -> tuple[Source, ...]:
    """One tensor, rearranged."""
    return (Source((name,), lambda tensors: arrange(tensors[0])),)


def folded(layers: Sequence[str], arrange: Callable[[list[Tensor]], Tensor]) -> tuple[Source, ...]:
    """The weights of `layers` with weight norm folded, arranged into one parameter.

    Args:
        layers: paths of convolutions in the checkpoint.
        arrange: makes the parameter from their weights, each in the convolution's own layout.
    """

    def source(naming: Sequence[str]) -> Source:
        def combine(tensors: list[Tensor]) -> Tensor:
            n = len(naming)
            return arrange([fold(*tensors[i : i + n]) for i in range(0, len(tensors), n)])

        return Source(tuple(f"{layer}.{name}" for layer in layers for name in naming), combine)

    return tuple(source(naming) for naming in _NAMINGS)


def fold(*stored: Tensor) -> Tensor:
    """w = g · v / ‖v‖, the norm over all dimensions but the first, or a plain w as it is.

    Source: Salimans and Kingma, arXiv 1602.07868, equation 2. For a transposed convolution the
    first dimension is the *input* channel.
    """
    if len(stored) == 1:
        return stored[0].float()
    g, v = (tensor.float() for tensor in stored)
    return v * (g / v.flatten(1).norm(dim=1).view_as(g))
