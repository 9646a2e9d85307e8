"""From the arguments of `generate` to a model's `Inputs`, checked against its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mstar.models.base import Inputs
from mstar.models.card import ModelCard
from mstar.models.parameters import demand
from mstar.types import MODALITIES

__all__ = ["gather_inputs", "output_modalities_for"]

_MODALITY_OF = {"text": "text", "images": "image", "audio": "audio", "video": "video"}
_LATENTS = ("video", "tensor", "scalar")  # what some servers call them


def gather_inputs(
    card: ModelCard,
    *,
    text: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    input_modalities: Sequence[str] | None = None,
    **media: Any,
) -> Inputs:
    """Check what kinds of input there are, and make lists of the media.

    Raises:
        InvalidRequest: nothing at all, of a wrong type, or of a kind that the model does not take.
    """
    demand(text is None or isinstance(text, str), "text", text, "must be a string")
    if messages is not None:
        demand(card.chat, "messages", messages, f"{card.name} does not chat; use text=")
        demand(text is None, "messages", messages, "give either text or messages, not both")
    given = {"text": text, **{field: _as_list(value) for field, value in media.items()}}
    for field, value in given.items():
        fits = value in (None, ()) or _MODALITY_OF[field] in card.inputs
        demand(fits, field, value, f"{card.name} takes {', '.join(card.inputs)} only")
    there = messages is not None or any(value not in (None, ()) for value in given.values())
    demand(there, "text", None, f"nothing was given; {card.name} takes {' or '.join(card.inputs)}")
    order = None
    if input_modalities is not None:
        order = _modalities("input_modalities", input_modalities, card.inputs, card.name)
    media = {field: value for field, value in given.items() if field != "text"}
    return Inputs(text=text, messages=messages, input_modalities=order, **media)


def output_modalities_for(card: ModelCard, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """What is to be made: what was asked for, or the model's default. Latents may be asked for as
    `video`, `tensor` or `scalar`, as servers of such models have it.

    Raises:
        InvalidRequest: unknown, or not what the model makes.
    """
    if wanted is None:
        return card.default_output
    return _modalities("output_modalities", wanted, card.outputs, card.name)


def _modalities(
    field: str, wanted: Sequence[str], allowed: Sequence[str], name: str
) -> tuple[str, ...]:
    listed = isinstance(wanted, (str, list, tuple, set, frozenset))
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted) if listed else ()
    fits = listed and all(isinstance(name, str) for name in names)
    demand(fits, field, wanted, "must be a list of modalities")
    demand(bool(names), field, wanted, f"must name at least one of {', '.join(allowed)}")
    if field == "output_modalities" and "latent" in allowed:
        names = tuple(
            dict.fromkeys("latent" if n in _LATENTS and n not in allowed else n for n in names)
        )
    for modality in names:
        demand(modality in MODALITIES, field, modality, f"must be one of {', '.join(MODALITIES)}")
        demand(modality in allowed, field, modality, f"{name} has {', '.join(allowed)} only")
    return names


def _as_list(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
