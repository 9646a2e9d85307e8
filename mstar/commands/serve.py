"""`mstar serve`: a model behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mstar.commands.errors import errors
from mstar.commands.options import weight_places
from mstar.errors import MStarError
from mstar.models import registry


def serve(
    model: Annotated[str, typer.Argument(help="A name from `mstar models`, a folder or a repo.")],
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="A folder or repo with the weights, or part=folder (repeatable)."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 ...")] = None,
    load_format: Annotated[str, typer.Option(help="auto, or dummy for random weights.")] = "auto",
    kv_tokens: Annotated[int | None, typer.Option(help="Size of the KV cache in tokens.")] = None,
    memory_fraction: Annotated[
        float, typer.Option(help="Share of the free device memory for the KV cache.")
    ] = 0.9,
    max_batch: Annotated[int, typer.Option(help="Most sequences in one batch.")] = 64,
    max_running: Annotated[int, typer.Option(help="Most requests that run at a time.")] = 256,
    max_queue: Annotated[int, typer.Option(help="Most requests that wait; then 503.")] = 1024,
    token_budget: Annotated[
        int, typer.Option(help="Most prompt tokens in one batch of a decoder.")
    ] = 512,
    prefix_cache: Annotated[
        bool, typer.Option(help="Reuse the KV cache of common beginnings.")
    ] = True,
    look_ahead: Annotated[
        bool | None,
        typer.Option(help="Launch a decode step before the last token is read (default on a GPU)."),
    ] = None,
    cpu_threads: Annotated[
        int | None, typer.Option(help="Threads that operations on a CPU use.")
    ] = None,
    max_body_mb: Annotated[float, typer.Option(help="Longest request body, in MiB.")] = 64,
    body_timeout: Annotated[
        float, typer.Option(help="Seconds within which a client must have sent the body.")
    ] = 60.0,
    header_timeout: Annotated[
        float, typer.Option(help="Seconds within which it must have sent the headers.")
    ] = 10.0,
    max_connections: Annotated[
        int, typer.Option(help="Most connections; then the longest idle one makes room.")
    ] = 2048,
    allow_remote_media: Annotated[
        bool,
        typer.Option(
            "--allow-remote-media",
            help="Fetch media by http and https URLs, from public addresses only.",
        ),
    ] = False,
    media_dir: Annotated[
        Path | None, typer.Option(help="A folder whose files requests may name as media.")
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Most pixels of an image, or of a frame of a video.")
    ] = 2**26,
    max_audio_seconds: Annotated[float, typer.Option(help="Longest sound that is taken.")] = 600.0,
    max_video_seconds: Annotated[float, typer.Option(help="Longest video that is taken.")] = 600.0,
    max_video_frames: Annotated[int, typer.Option(help="Most frames of a video.")] = 36_000,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds that any request may take.")
    ] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests have after SIGTERM.", min=0)
    ] = 30.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="MSTAR_API_KEY", help="Clients must send it as Bearer.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Another name of the model (repeatable).")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may call (repeatable).")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_stats: Annotated[
        float, typer.Option(help="Seconds between two lines of figures; 0 for none.", min=0)
    ] = 0.0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Serve a model over HTTP: the native route and OpenAI's. Needs `mstar[server]`."""
    with errors(debug):
        places = weight_places(weights or [])
        registry.find(model, places)
        try:
            from mstar.http import serve as run
            from mstar.http.server import Listening
        except ModuleNotFoundError as error:
            raise MStarError(str(error)) from None
        run(
            model,
            listening=Listening(
                host,
                port,
                log_level,
                drain_timeout,
                log_stats,
                header_timeout,
                max_connections,
            ),
            engine_options={
                "weights": places,
                "device": device,
                "dtype": dtype,
                "load_format": load_format,
                "kv_tokens": kv_tokens,
                "memory_fraction": memory_fraction,
                "max_batch": max_batch,
                "max_running": max_running,
                "max_queue": max_queue,
                "token_budget": token_budget,
                "prefix_cache": prefix_cache,
                "look_ahead": look_ahead,
                "cpu_threads": cpu_threads,
            },
            app_options={
                "served_model_name": served_model_name or (),
                "api_key": api_key,
                "max_body_mb": max_body_mb,
                "request_timeout": request_timeout,
                "body_timeout": body_timeout,
                "cors_origins": cors_origin or (),
                "allow_remote_media": allow_remote_media,
                "media_dir": media_dir,
                "max_pixels": max_pixels,
                "max_audio_seconds": max_audio_seconds,
                "max_video_seconds": max_video_seconds,
                "max_video_frames": max_video_frames,
            },
        )
