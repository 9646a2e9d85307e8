"""From the arguments of `generate` to a model's `Inputs`, checked against its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mstar.errors import InvalidRequest
from mstar.models.base import Inputs
from mstar.models.card import ModelCard
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
    if text is not None and not isinstance(text, str):
        raise InvalidRequest("text", text, "must be a string")
    if messages is not None:
        if not card.chat:
            raise InvalidRequest("messages", messages, f"{card.name} does not chat; use text=")
        if text is not None:
            raise InvalidRequest("messages", messages, "give either text or messages, not both")
    given = {"text": text, **{field: _as_list(value) for field, value in media.items()}}
    for field, value in given.items():
        if value is not None and value != () and _MODALITY_OF[field] not in card.inputs:
            taken = ", ".join(card.inputs)
            raise InvalidRequest(field, value, f"{card.name} takes {taken} only")
    if messages is None and all(value in (None, ()) for value in given.values()):
        raise InvalidRequest(
            "text", None, f"nothing was given; {card.name} takes {_or(card.inputs)}"
        )
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
    if not isinstance(wanted, (str, list, tuple, set, frozenset)):
        raise InvalidRequest(field, wanted, "must be a list of modalities")
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if not names:
        raise InvalidRequest(field, wanted, f"must name at least one of {', '.join(allowed)}")
    if field == "output_modalities" and "latent" in allowed:
        names = tuple(
            dict.fromkeys("latent" if n in _LATENTS and n not in allowed else n for n in names)
        )
    for modality in names:
        if modality not in MODALITIES:
            raise InvalidRequest(field, modality, f"must be one of {', '.join(MODALITIES)}")
        if modality not in allowed:
            raise InvalidRequest(field, modality, f"{name} has {', '.join(allowed)} only")
    return names


def _as_list(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)
