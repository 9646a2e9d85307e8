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
from mstar.models.card import ModelCard

__all__ = ["Surfaces", "missing_routes", "surfaces_of"]

# Fields of a request in OpenAI's words -> arguments of `Engine.submit`.
Adapter = Callable[[dict[str, Any]], dict[str, Any]]

_ROUTES = {
    "speech": ("/v1/audio/speech",),
    "chat": ("/v1/chat/completions", "/v1/completions", "/v1/responses"),
    "images": ("/v1/images/generations", "/v1/images/edits", "/v1/images/variations"),
    "embeddings": ("/v1/embeddings",),
    "transcriptions": ("/v1/audio/transcriptions", "/v1/audio/translations"),
}
_WHAT = {
    "speech": "make speech",
    "chat": "chat over this route",
    "images": "make images over this route",
    "embeddings": "make embeddings",
    "transcriptions": "transcribe",
}


@dataclass(frozen=True)
class Surfaces:
    """The adapters of one model; `None` where it lacks the route."""

    speech: Adapter | None = None


def speech_from_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Speech of a model that takes text and a `voice` and makes audio."""
    arguments = {"text": fields["input"], "output_modalities": ("audio",)}
    if fields.get("voice") is not None:
        arguments["voice"] = fields["voice"]
    return arguments


_OF_FAMILY: dict[str, Surfaces] = {}


def surfaces_of(card: ModelCard) -> Surfaces:
    """What a model offers."""
    if card.name in _OF_FAMILY:
        return _OF_FAMILY[card.name]
    speaks = "text" in card.inputs and "audio" in card.outputs
    return Surfaces(speech=speech_from_text if speaks else None)


def missing_routes(card: ModelCard, surfaces: Surfaces) -> APIRouter:
    """A 404 on every route that the model lacks, naming the ones to use."""
    router = APIRouter(include_in_schema=False)
    there = [f"POST {_ROUTES['speech'][0]}"] if surfaces.speech is not None else []
    instead = " or ".join([*there, "POST /generate"])
    for surface, paths in _ROUTES.items():
        if getattr(surfaces, surface, None) is not None:
            continue
        message = f"{card.name} does not {_WHAT[surface]}; use {instead}"
        for path in paths:
            router.add_api_route(path, _refusing(message), methods=["POST"])
    return router


def _refusing(message: str) -> Callable[[], Any]:
    async def refuse() -> None:
        raise Refused(404, message, code="unsupported_route")

    return refuse
