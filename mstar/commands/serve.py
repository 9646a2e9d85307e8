"""`mstar serve`: a model behind HTTP."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from mstar.commands.errors import errors
from mstar.commands.options import (
    Count,
    File,
    Text,
    Texts,
    model_options,
    numbers,
    option,
    weight_places,
)
from mstar.errors import MStarError
from mstar.models import registry


def _options(panel: str) -> Any:
    """Makes the options of one group; short words for values leave room for the names."""

    def make(metavar: str | None, help: str, *names: str, **more: Any) -> Any:
        return option(help, *names, metavar=metavar, rich_help_panel=panel, **more)

    return make


_listen = _options("Where and for whom")
_load = _options("Loading")
_robot = _options("Robots, by websocket")
_run = _options("Running")
_limit = _options("Limits of requests")
_media = _options("Limits of media")
_log = _options("Logging")
_KEY = _listen("KEY", "Clients must send it as Bearer.", envvar="MSTAR_API_KEY")
_ORIGINS = _listen("URL", "Whose pages may call (repeatable).", "--cors-origin")
_REMOTE = _media(None, "Fetch URLs, from public addresses only.", "--allow-remote-media")
_STATS = _log("S", "Seconds between figures; 0: none.", "--log-stats", min=0)


def serve(
    model: Annotated[str, typer.Argument(help="A name from `mstar models`, a folder or a repo.")],
    host: Annotated[str, _listen("HOST", "Where to listen.")] = "127.0.0.1",
    port: Annotated[int, _listen("N", "0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[Text, _KEY] = None,
    served_model_name: Annotated[Texts, _listen("NAME", "Another name (repeatable).")] = None,
    cors_origins: Annotated[Texts, _ORIGINS] = None,
    weights: Annotated[
        Texts, _load("PLACE", "Folder or repo, or part=folder (repeatable).")
    ] = None,
    device: Annotated[Text, _load("NAME", "cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[Text, _load("NAME", "float32, bfloat16 ...")] = None,
    quantization: Annotated[Text, _load("NAME", "int8 or fp8: weights of 8 bits.")] = None,
    load_format: Annotated[str, _load("NAME", "auto, or dummy for random weights.")] = "auto",
    kv_tokens: Annotated[Count, _load("N", "Size of the KV cache in tokens.")] = None,
    memory_fraction: Annotated[
        float, _load("X", "Of the free device memory, for the KV cache.")
    ] = 0.9,
    cpu_threads: Annotated[Count, _load("N", "Threads of operations on a CPU.")] = None,
    options: Annotated[Texts, _load("K=V", "Of the model (repeatable).", "--option")] = None,
    robot: Annotated[
        Text, _robot("NAME", "droid, libero or aloha, if not the checkpoint's.")
    ] = None,
    default_prompt: Annotated[Text, _robot("TEXT", "The task where a robot sends none.")] = None,
    reset_pose: Annotated[Text, _robot("X,X,...", "Joints where episodes begin.")] = None,
    max_batch: Annotated[int, _run("N", "Most sequences in one batch.")] = 64,
    max_running: Annotated[int, _run("N", "Most requests at a time.")] = 256,
    max_queue: Annotated[int, _run("N", "Most that wait, then 503; 0: none waits.")] = 1024,
    token_budget: Annotated[int, _run("N", "Most prompt tokens in one decoder batch.")] = 512,
    prefix_cache: Annotated[bool, _run(None, "Reuse the KV cache of common beginnings.")] = True,
    look_ahead: Annotated[
        bool | None, _run(None, "Launch a step before the last token is read (on a GPU).")
    ] = None,
    max_body_mb: Annotated[
        float, _limit("MIB", "Longest body; 8 times that for all at a time.")
    ] = 64,
    request_timeout: Annotated[float, _limit("S", "Seconds that any request may take.")] = 600.0,
    body_timeout: Annotated[float, _limit("S", "Seconds to send the body.")] = 60.0,
    header_timeout: Annotated[float, _limit("S", "Seconds to send the headers.")] = 10.0,
    drain_timeout: Annotated[float, _limit("S", "Seconds to end after SIGTERM.", min=0)] = 30.0,
    max_connections: Annotated[int, _limit("N", "Then the longest idle one makes room.")] = 2048,
    allow_remote_media: Annotated[bool, _REMOTE] = False,
    media_dir: Annotated[File, _media("FOLDER", "Whose files requests may name.")] = None,
    max_pixels: Annotated[int, _media("N", "Of an image, or of a frame of a video.")] = 2**26,
    max_audio_seconds: Annotated[float, _media("S", "Longest sound.")] = 600.0,
    max_video_seconds: Annotated[float, _media("S", "Longest video.")] = 600.0,
    max_video_frames: Annotated[int, _media("N", "Most frames of it.")] = 36_000,
    log_level: Annotated[str, _log("NAME", "debug, info, warning or error.")] = "info",
    stats_interval: Annotated[float, _STATS] = 0.0,
    debug: Annotated[bool, _log(None, "Show tracebacks of errors.", "--debug")] = False,
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
