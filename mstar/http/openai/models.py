"""`GET /v1/models`, and the model that a request names."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from mstar.http.errors import Refused
from mstar.http.front import Front

__all__ = ["check_model", "model_routes"]


def model_routes(front: Front) -> APIRouter:
    """The list of names, and each of them."""
    router = APIRouter()
    created = int(time.time())

    def shown(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "mstar"}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """All names of the model."""
        return {"object": "list", "data": [shown(name) for name in front.names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        check_model(front, name)
        return shown(name)

    return router


def check_model(front: Front, name: Any) -> str:
    """`name`, if the server's model is called so.

    Raises:
        Refused: 400 if it is missing, 404 if it is another's.
    """
    if not isinstance(name, str) or not name:
        raise Refused(400, "model: must be the name of a model", param="model")
    if name not in front.names:
        known = ", ".join(front.names)
        message = f"model={name[:80]!r}: not served here; there is {known}"
        raise Refused(404, message, param="model", code="model_not_found")
    return name
