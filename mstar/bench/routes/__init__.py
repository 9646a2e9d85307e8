"""How each protocol asks, and how its answers are read; one file per protocol."""

from __future__ import annotations

from mstar.bench.routes.base import Ask, Reader, Request, Route
from mstar.bench.routes.chat import Chat
from mstar.bench.routes.images import Images
from mstar.bench.routes.native import Native
from mstar.bench.routes.speech import Speech

__all__ = ["ROUTES", "Ask", "Reader", "Request", "Route"]

ROUTES: dict[str, type[Route]] = {
    "generate": Native,
    "chat": Chat,
    "speech": Speech,
    "images": Images,
}
