"""What a model's chat is like in OpenAI's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mstar.models.card import ModelCard

__all__ = ["ChatSurface", "chat_of"]

_MODALITIES = ("text", "audio", "image")
_USUAL = {"max_completion_tokens": "max_output_tokens", "max_tokens": "max_output_tokens"}


@dataclass(frozen=True)
class ChatSurface:
    """The chat of one model.

    Args:
        modalities: what a reply may hold; `"text"` is always among it.
        names: field of OpenAI -> parameter of the model, where that differs from the field's own
            name (`max_output_tokens` for the two fields that limit the length).
    """

    modalities: tuple[str, ...] = ("text",)
    names: Mapping[str, str] = field(default_factory=dict)

    def parameter(self, card: ModelCard, name: str) -> str | None:
        """The parameter that a field of OpenAI sets; `None` if the model has none."""
        own = self.names.get(name) or _USUAL.get(name, name)
        return card.parameters[own].name if own in card.parameters else None


def chat_of(card: ModelCard) -> ChatSurface | None:
    """The surface that a card alone tells of; `None` if the model does not answer in text."""
    if not card.chat or "text" not in card.outputs:
        return None
    return ChatSurface(tuple(name for name in _MODALITIES if name in card.outputs))
