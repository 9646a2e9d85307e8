"""The FastAPI app over one Engine."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import Response

import mstar
from mstar.errors import MStarError
from mstar.http.errors import Refused, error_response
from mstar.http.front import Front
from mstar.http.middleware import Doorkeeper, Recorder
from mstar.http.native import native_routes
from mstar.http.openai import openai_routes
from mstar.http.policy import shown_policy
from mstar.http.policy_socket import policy_routes
from mstar.http.probes import probe_routes
from mstar.http.settings import Settings

__all__ = ["create_app"]


def create_app(engine: Any, settings: Settings | None = None, **options: Any) -> FastAPI:
    """An app with the native route, the OpenAI-compatible routes, the probes, and a websocket for
    robots where the model is a policy.

    It can be served as it is, or mounted in another app. It does not close the engine.

    Args:
        engine: a running `Engine`.
        settings: what the operator chooses.
        options: instead of `settings`: its fields.

    Raises:
        InvalidRequest: a limit that nothing can keep, a folder that is not there, or a robot that
            the model cannot serve.
    """
    settings = settings or Settings(**options)
    front = Front(engine, settings)
    app = FastAPI(title="mstar", version=mstar.__version__, redoc_url=None)
    app.state.front = front
    app.include_router(probe_routes(front))
    app.include_router(native_routes(front))
    app.include_router(openai_routes(front))
    app.include_router(policy_routes(front, shown_policy(front)))
    for kind in (Refused, MStarError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    if settings.api_key is not None:
        app.add_middleware(Doorkeeper, key=settings.api_key)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-mstar-error"],
        )
    app.add_middleware(Recorder, front=front)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    """Any error in the shape of the route; FastAPI's own ones too."""
    if isinstance(error, RequestValidationError):
        error = Refused(400, str(error.errors()[0].get("msg", "invalid request")))
    elif isinstance(error, HTTPException):
        where = f"{request.method} {request.url.path[:200]}"
        error = Refused(error.status_code, f"{error.detail}: {where}", headers=error.headers)
    return error_response(error, request.scope)
