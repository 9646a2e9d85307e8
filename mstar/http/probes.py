"""What operators ask a server: health, readiness, version, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

import mstar
from mstar.http.errors import Refused
from mstar.http.front import Front

__all__ = ["probe_routes"]


def probe_routes(front: Front) -> APIRouter:
    """Routes that need no key."""
    router = APIRouter()

    def both(path: str) -> Callable[[Callable], Callable]:
        def add(function: Callable) -> Callable:
            router.add_api_route(path, function, methods=["HEAD"], include_in_schema=False)
            return router.get(path)(function)

        return add

    def state(good: str) -> Response:
        try:
            front.check_open()
        except Refused as refused:
            status = "draining" if front.draining else "dead"
            return JSONResponse({"status": status, "detail": refused.message}, 503)
        return JSONResponse({"status": good})

    @both("/health")
    async def health() -> Response:
        """200 while the engine lives and takes work."""
        return state("healthy")

    @both("/ready")
    async def ready() -> Response:
        """200 once the model is loaded, until the server drains."""
        return state("ready")

    @both("/version")
    async def version() -> dict[str, str]:
        """The version of mstar, and the model."""
        return {"version": mstar.__version__, "model": front.names[0]}

    @both("/metrics")
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        page = await asyncio.to_thread(front.metrics.page)
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    return router
