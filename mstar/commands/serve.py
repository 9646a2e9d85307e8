"""`mstar serve`: a model behind HTTP."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from mstar.commands.errors import errors
from mstar.commands.options import model_options, numbers, weight_places
from mstar.errors import MStarError
from mstar.models import registry


def _options(panel: str) -> Any:
    """Makes the options of one group; short words for values leave room for the names."""

    def option(*names: str, metavar: str | None = None, **more: Any) -> Any:
        return typer.Option(*names, metavar=metavar, rich_help_panel=panel, **more)

    return option


_listen = _options("Where and for whom")
_load = _options("Loading")
_robot = _options("Robots, by websocket")
_run = _options("Running")
_limit = _options("Limits of requests")
_media = _options("Limits of media")
_log = _options("Logging")


def serve(
    model: Annotated[str, typer.Argument(help="A name from `mstar models`, a folder or a repo.")],
    host: Annotated[str, _listen(metavar="HOST", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, _listen(metavar="N", help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        _listen(metavar="KEY", envvar="MSTAR_API_KEY", help="Clients must send it as Bearer."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None, _listen(metavar="NAME", help="Another name (repeatable).")
    ] = None,
    cors_origins: Annotated[
        list[str] | None,
        _listen("--cors-origin", metavar="URL", help="Whose pages may call (repeatable)."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        _load(metavar="PLACE", help="Folder or repo, or part=folder (repeatable)."),
    ] = None,
    device: Annotated[str | None, _load(metavar="NAME", help="cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[str | None, _load(metavar="NAME", help="float32, bfloat16 ...")] = None,
    load_format: Annotated[
        str, _load(metavar="NAME", help="auto, or dummy for random weights.")
    ] = "auto",
    kv_tokens: Annotated[
        int | None, _load(metavar="N", help="Size of the KV cache in tokens.")
    ] = None,
    memory_fraction: Annotated[
        float, _load(metavar="X", help="Of the free device memory, for the KV cache.")
    ] = 0.9,
    cpu_threads: Annotated[
        int | None, _load(metavar="N", help="Threads of operations on a CPU.")
    ] = None,
    options: Annotated[
        list[str] | None, _load("--option", metavar="K=V", help="Of the model (repeatable).")
    ] = None,
    robot: Annotated[
        str | None, _robot(metavar="NAME", help="droid, libero or aloha, if not the checkpoint's.")
    ] = None,
    default_prompt: Annotated[
        str | None, _robot(metavar="TEXT", help="The task where a robot sends none.")
    ] = None,
    reset_pose: Annotated[
        str | None, _robot(metavar="X,X,...", help="Joints where episodes begin.")
    ] = None,
    max_batch: Annotated[int, _run(metavar="N", help="Most sequences in one batch.")] = 64,
    max_running: Annotated[int, _run(metavar="N", help="Most requests at a time.")] = 256,
    max_queue: Annotated[
        int, _run(metavar="N", help="Most that wait, then 503; 0: none waits.")
    ] = 1024,
    token_budget: Annotated[
        int, _run(metavar="N", help="Most prompt tokens in one decoder batch.")
    ] = 512,
    prefix_cache: Annotated[bool, _run(help="Reuse the KV cache of common beginnings.")] = True,
    look_ahead: Annotated[
        bool | None, _run(help="Launch a step before the last token is read (on a GPU).")
    ] = None,
    max_body_mb: Annotated[
        float, _limit(metavar="MIB", help="Longest body; 8 times that for all at a time.")
    ] = 64,
    request_timeout: Annotated[
        float, _limit(metavar="S", help="Seconds that any request may take.")
    ] = 600.0,
    body_timeout: Annotated[float, _limit(metavar="S", help="Seconds to send the body.")] = 60.0,
    header_timeout: Annotated[
        float, _limit(metavar="S", help="Seconds to send the headers.")
    ] = 10.0,
    drain_timeout: Annotated[
        float, _limit(metavar="S", help="Seconds to end after SIGTERM.", min=0)
    ] = 30.0,
    max_connections: Annotated[
        int, _limit(metavar="N", help="Then the longest idle one makes room.")
    ] = 2048,
    allow_remote_media: Annotated[
        bool, _media("--allow-remote-media", help="Fetch URLs, from public addresses only.")
    ] = False,
    media_dir: Annotated[
        Path | None, _media(metavar="FOLDER", help="Whose files requests may name.")
    ] = None,
    max_pixels: Annotated[
        int, _media(metavar="N", help="Of an image, or of a frame of a video.")
    ] = 2**26,
    max_audio_seconds: Annotated[float, _media(metavar="S", help="Longest sound.")] = 600.0,
    max_video_seconds: Annotated[float, _media(metavar="S", help="Longest video.")] = 600.0,
    max_video_frames: Annotated[int, _media(metavar="N", help="Most frames of it.")] = 36_000,
    log_level: Annotated[str, _log(metavar="NAME", help="debug, info, warning or error.")] = "info",
    stats_interval: Annotated[
        float, _log("--log-stats", metavar="S", help="Seconds between figures; 0: none.", min=0)
    ] = 0.0,
    debug: Annotated[bool, _log("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Serve a model over HTTP: the native route and OpenAI's. Needs the extra `server`."""
    given = {name: value for name, value in locals().items() if name not in ("model", "debug")}
    with errors(debug):
        given["weights"] = weight_places(weights or [])
        given["options"] = model_options(options or [])
        given["reset_pose"] = numbers("--reset-pose", reset_pose)
        registry.find(model, given["weights"])
        try:
            from mstar.http import serve as run
            from mstar.http.server import Listening
            from mstar.http.settings import Settings
        except ModuleNotFoundError as error:
            raise MStarError(str(error)) from None
        given |= {name: given[name] or () for name in ("served_model_name", "cors_origins")}
        settings, listening = _taken(Settings, given), _taken(Listening, given)
        run(model, listening=listening, settings=settings, engine_options=given)


def _taken(kind: Any, given: dict[str, Any]) -> Any:
    """A dataclass of the options that are its fields; those that are left are the engine's."""
    return kind(**{f.name: given.pop(f.name) for f in fields(kind) if f.name in given})
