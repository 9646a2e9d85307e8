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
from mstar.http.openai.chat_surface import ChatSurface, chat_of
from mstar.http.openai.images_surface import ImagesSurface, images_of
from mstar.models.card import ModelCard

__all__ = ["Surfaces", "missing_routes", "surfaces_of"]

# Fields of a request in OpenAI's words -> arguments of `Engine.submit`.
Adapter = Callable[[dict[str, Any]], dict[str, Any]]

_ROUTES = {
    "speech": ("/v1/audio/speech",),
    "chat": ("/v1/chat/completions",),
    "completions": ("/v1/completions", "/v1/responses"),
    "images": ("/v1/images/generations",),
    "edits": ("/v1/images/edits",),
    "variations": ("/v1/images/variations",),
    "embeddings": ("/v1/embeddings",),
    "transcriptions": ("/v1/audio/transcriptions", "/v1/audio/translations"),
}
_WHAT = {
    "speech": "make speech",
    "chat": "chat over this route",
    "completions": "complete text over this route",
    "images": "make images over this route",
    "edits": "edit images",
    "variations": "vary images",
    "embeddings": "make embeddings",
    "transcriptions": "transcribe",
}


@dataclass(frozen=True)
class Surfaces:
    """The adapters of one model; `None` where it lacks the route."""

    speech: Adapter | None = None
    chat: ChatSurface | None = None
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
        chat=ChatSurface(("text",)),
        images=ImagesSurface(
            steps="num_timesteps", fewer_steps=1, mask=None, fidelity=None, keeps_size=False
        ),
    ),
}


def surfaces_of(card: ModelCard) -> Surfaces:
    """What a model offers."""
    if card.name in _OF_FAMILY:
        return _OF_FAMILY[card.name]
    speaks = "text" in card.inputs and "audio" in card.outputs
    speech = speech_from_text if speaks else None
    return Surfaces(speech=speech, chat=chat_of(card), images=images_of(card))


def missing_routes(card: ModelCard, surfaces: Surfaces) -> APIRouter:
    """A 404 on every route that the model lacks, naming the ones to use."""
    router = APIRouter(include_in_schema=False)
    has = [name for name in _ROUTES if getattr(surfaces, name, None) is not None]
    there = [f"POST {_ROUTES[name][0]}" for name in has]
    instead = " or ".join([*there, "POST /generate"])
    for surface, paths in _ROUTES.items():
        if surface in has:
            continue
        message = f"{card.name} does not {_WHAT[surface]}; use {instead}"
        for path in paths:
            router.add_api_route(path, _refusing(message), methods=["POST"])
    return router


def _refusing(message: str) -> Callable[[], Any]:
    async def refuse() -> None:
        raise Refused(404, message, code="unsupported_route")

    return refuse
