"""Which of OpenAI's routes a model has, and what to say on the others.

A family that needs an adapter of its own gets an entry in `_OF_FAMILY`; what a card alone tells is
enough for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter

from mstar.http.errors import Refused
from mstar.http.openai.images_surface import ImagesSurface, images_of
from mstar.models.card import ModelCard

__all__ = ["Surfaces", "missing_routes", "surfaces_of"]

# Fields of a request in OpenAI's words -> arguments of `Engine.submit`.
Adapter = Callable[[dict[str, Any]], dict[str, Any]]

# Surface -> what a model does there, and the routes.
_ROUTES = {
    "speech": ("make speech", "/v1/audio/speech"),
    "chat": ("chat over this route", "/v1/chat/completions"),
    "completions": ("complete text over this route", "/v1/completions", "/v1/responses"),
    "images": ("make images over this route", "/v1/images/generations"),
    "edits": ("edit images", "/v1/images/edits"),
    "variations": ("vary images", "/v1/images/variations"),
    "embeddings": ("make embeddings", "/v1/embeddings"),
    "transcriptions": ("transcribe", "/v1/audio/transcriptions", "/v1/audio/translations"),
}
_REPLIES = ("text", "audio", "image")


@dataclass(frozen=True)
class Surfaces:
    """The adapters of one model; `None` where it lacks the route."""

    speech: Adapter | None = None
    chat: tuple[str, ...] | None = None  # what a reply may hold; "text" is always among it
    images: ImagesSurface | None = None

    @property
    def edits(self) -> ImagesSurface | None:
        """The images, if they can be edited."""
        return self.images if self.images is not None and self.images.edits else None


def speech_from_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Speech of a model that takes text and a `voice` and makes audio."""
    arguments = {"text": fields["input"], "output_modalities": ("audio",)}
    if fields.get("voice") is not None:
        arguments["voice"] = fields["voice"]
    return arguments


_OF_FAMILY: dict[str, Surfaces] = {
    "bagel": Surfaces(
        chat=("text",),
        images=ImagesSurface(steps="num_timesteps", fewer_steps=1, mask=None, keeps_size=False),
    ),
}


def surfaces_of(card: ModelCard) -> Surfaces:
    """What a model offers."""
    if card.name in _OF_FAMILY:
        return _OF_FAMILY[card.name]
    speaks = "text" in card.inputs and "audio" in card.outputs
    speech = speech_from_text if speaks else None
    chat = tuple(name for name in _REPLIES if name in card.outputs)
    chats = card.chat and "text" in chat
    return Surfaces(speech=speech, chat=chat if chats else None, images=images_of(card))


def missing_routes(card: ModelCard, surfaces: Surfaces) -> APIRouter:
    """A 404 on every route that the model lacks, naming the ones to use."""
    router = APIRouter(include_in_schema=False)
    has = [name for name in _ROUTES if getattr(surfaces, name, None) is not None]
    there = [f"POST {_ROUTES[name][1]}" for name in has]
    instead = " or ".join([*there, "POST /generate"])
    for surface, (what, *paths) in _ROUTES.items():
        if surface in has:
            continue
        message = f"{card.name} does not {what}; use {instead}"
        for path in paths:
            router.add_api_route(path, _refusing(message), methods=["POST"])
    return router


def _refusing(message: str) -> Callable[[], Any]:
    async def refuse() -> None:
        raise Refused(404, message, code="unsupported_route")

    return refuse
