"""The OpenAI-compatible routes, under /v1."""

from __future__ import annotations

from fastapi import APIRouter

from mstar.http.front import Front
from mstar.http.openai.chat import chat_routes
from mstar.http.openai.images import images_routes
from mstar.http.openai.models import model_routes
from mstar.http.openai.speech import speech_routes
from mstar.http.openai.surfaces import missing_routes, surfaces_of

__all__ = ["openai_routes"]


def openai_routes(front: Front) -> APIRouter:
    """The models, the surfaces that this model has, and a 404 on each of the others."""
    router = APIRouter()
    surfaces = surfaces_of(front.card)
    router.include_router(model_routes(front))
    if surfaces.speech is not None:
        router.include_router(speech_routes(front, surfaces.speech))
    if surfaces.chat is not None:
        router.include_router(chat_routes(front, surfaces.chat))
    if surfaces.images is not None:
        router.include_router(images_routes(front, surfaces.images))
    router.include_router(missing_routes(front.card, surfaces))
    return router
