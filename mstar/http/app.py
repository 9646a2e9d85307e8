"""The FastAPI app over one Engine."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import Response

import mstar
from mstar.errors import InvalidRequest, MStarError
from mstar.http.errors import Refused, error_response
from mstar.http.front import Front
from mstar.http.middleware import Doorkeeper, Recorder, is_openai
from mstar.http.native import native_routes
from mstar.http.openai import openai_routes
from mstar.http.probes import probe_routes
from mstar.http.settings import Settings

__all__ = ["create_app"]


def create_app(
    engine: Any,
    *,
    served_model_name: Sequence[str] = (),
    api_key: str | None = None,
    max_body_mb: float = 64,
    request_timeout: float | None = 600.0,
    body_timeout: float = 60.0,
    cors_origins: Sequence[str] = (),
    allow_remote_media: bool = False,
    media_dir: str | PathLike | None = None,
    max_pixels: int = 2**26,
    max_audio_seconds: float = 600.0,
    max_video_seconds: float = 600.0,
    max_video_frames: int = 36_000,
) -> FastAPI:
    """An app with the native route, the OpenAI-compatible routes and the probes.

    It can be served as it is, or mounted in another app. It does not close the engine.

    Args:
        engine: a running `Engine`.
        served_model_name: what clients may call the model, beside the names of its own; the first
            is shown.
        api_key: clients must send it as `Authorization: Bearer KEY`.
        max_body_mb: longest request body, in MiB.
        request_timeout: seconds that any request may take; `None` for no limit.
        body_timeout: seconds within which a client must have sent the body.
        cors_origins: origins whose pages may call the server.
        allow_remote_media: fetch media that requests name by http and https URLs, from public
            addresses only.
        media_dir: a folder whose files requests may name as media.
        max_pixels: most pixels of an image, or of a frame of a video.
        max_audio_seconds: longest sound that is taken.
        max_video_seconds, max_video_frames: longest video that is taken.

    Raises:
        InvalidRequest: a limit that nothing can keep, or a folder that is not there.
    """
    _check_above_0(
        max_body_mb=max_body_mb,
        body_timeout=body_timeout,
        max_pixels=max_pixels,
        max_audio_seconds=max_audio_seconds,
        max_video_seconds=max_video_seconds,
        max_video_frames=max_video_frames,
    )
    if media_dir is not None and not Path(media_dir).is_dir():
        raise InvalidRequest("media_dir", str(media_dir), "is no folder")
    settings = Settings(
        names=tuple(dict.fromkeys([*served_model_name, engine.name, engine.card.name])),
        api_key=api_key or None,
        max_body_bytes=int(max_body_mb * 2**20),
        body_timeout=body_timeout,
        request_timeout=request_timeout,
        cors_origins=tuple(cors_origins),
        allow_remote_media=allow_remote_media,
        media_dir=Path(media_dir).resolve() if media_dir is not None else None,
        max_pixels=max_pixels,
        max_audio_seconds=max_audio_seconds,
        max_video_seconds=max_video_seconds,
        max_video_frames=max_video_frames,
    )
    front = Front(engine, settings)
    app = FastAPI(title="mstar", version=mstar.__version__, redoc_url=None)
    app.state.front = front
    app.include_router(probe_routes(front))
    app.include_router(native_routes(front))
    app.include_router(openai_routes(front))
    for kind in (Refused, MStarError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    if settings.api_key is not None:
        app.add_middleware(Doorkeeper, key=settings.api_key)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(Recorder, front=front)
    return app


def _check_above_0(**limits: float) -> None:
    for name, value in limits.items():
        if not value > 0:
            raise InvalidRequest(name, value, "must be above 0")


async def _answer(request: Request, error: Exception) -> Response:
    """Any error in the shape of the route; FastAPI's own ones too."""
    if isinstance(error, RequestValidationError):
        error = Refused(400, str(error.errors()[0].get("msg", "invalid request")))
    elif isinstance(error, HTTPException):
        where = f"{request.method} {request.url.path[:200]}"
        error = Refused(error.status_code, f"{error.detail}: {where}", headers=error.headers)
    return error_response(error, openai=is_openai(request.scope))
