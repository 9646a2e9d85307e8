"""A process that serves one model: it listens once it can, and ends when it is done."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import signal
import socket
import sys
import warnings
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

try:
    from uvloop import run as _run
except ModuleNotFoundError:  # there is none on Windows
    from asyncio import run as _run

from mstar.errors import InvalidRequest
from mstar.http.app import create_app
from mstar.http.connections import guarded
from mstar.http.front import Front
from mstar.http.settings import Settings

__all__ = ["Listening", "bind", "config_of", "serve", "serve_engine"]

log = logging.getLogger("mstar.http")
LOG_LEVELS = ("debug", "info", "warning", "error")
_AWAKE = 0.1  # seconds between two looks at whether the last request has ended
_OTHER_FILES = 128  # of the process that are not connections
_CUT = 5  # seconds that connections have to end after their requests were cancelled


@dataclass(frozen=True)
class Listening:
    """How the process listens, logs and ends.

    Args:
        host, port: where; port 0 takes a free one.
        log_level: `debug`, `info`, `warning` or `error`.
        drain_timeout: seconds that running requests have after SIGTERM.
        stats_interval: seconds between two lines of figures in the log; 0 for none.
        header_timeout: seconds within which a client must have sent the headers of a request.
        max_connections: connections at a time; beyond that the longest idle one makes room.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    log_level: str = "info"
    drain_timeout: float = 30.0
    stats_interval: float = 0.0
    header_timeout: float = 10.0
    max_connections: int = 2048


def serve(
    model: str,
    *,
    listening: Listening,
    settings: Settings,
    engine_options: dict[str, Any],
) -> None:
    """Load the model, then serve it until SIGTERM or Ctrl-C.

    Args:
        model: what `Engine` takes.
        engine_options: keywords of `Engine`.

    Raises:
        MStarError: an option is wrong, or the model cannot be loaded.
        OSError: the address cannot be had.
    """
    if listening.log_level not in LOG_LEVELS:
        allowed = f"must be one of {', '.join(LOG_LEVELS)}"
        raise InvalidRequest("--log-level", listening.log_level, allowed)
    for option in ("header-timeout", "max-connections"):
        value = getattr(listening, option.replace("-", "_"))
        if not value > 0:
            raise InvalidRequest(f"--{option}", value, "must be above 0")
    _log_to_stderr(listening.log_level)
    bind(listening.host, listening.port).close()  # say now, not after minutes of loading
    from mstar.local import Engine  # this is where torch comes in

    with Engine(model, **{"warmup": True, **engine_options}) as engine:
        serve_engine(create_app(engine, settings), listening)


def serve_engine(app: Any, listening: Listening) -> None:
    """Serve an app of `create_app`; the engine is left as it is."""
    config = config_of(app, listening)
    with contextlib.closing(bind(listening.host, listening.port)) as listener:
        gc.collect()
        gc.freeze()  # else each full collection looks at all of torch, while everybody waits
        try:
            _run(_Server(config, app.state.front, listening).run(listener))
        finally:
            gc.unfreeze()  # what is still frozen at the end of the process counts as leaked
        log.info("ended")


def config_of(app: Any, listening: Listening) -> uvicorn.Config:
    """How uvicorn is to serve an app of `create_app`."""
    stall_timeout = app.state.front.settings.body_timeout
    most = min(listening.max_connections, _most_files() - _OTHER_FILES)
    return uvicorn.Config(
        app,
        http=guarded(listening.header_timeout, stall_timeout, max(most, 1)),
        ws="websockets-sansio",
        ws_max_size=app.state.front.settings.max_body_bytes,
        ws_per_message_deflate=False,  # camera images only get slower by it
        log_config=None,
        access_log=False,  # the app logs one line per request itself
        lifespan="off",  # the app has none, and uvicorn would tell of its sudden end
        timeout_graceful_shutdown=_CUT,
        server_header=False,
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, not yet listening.

    Raises:
        OSError: it cannot be had.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), f"{host}:{port}") from None
    return listener


class _Server(uvicorn.Server):
    """Drains at the first signal while it still answers `/health`; ends at once at the second."""

    def __init__(self, config: uvicorn.Config, front: Front, listening: Listening) -> None:
        super().__init__(config)
        self._front, self._listening = front, listening
        self._ending: asyncio.Event | None = None

    async def run(self, listener: socket.socket) -> None:
        """Serve until a signal comes and what was begun has ended."""
        self._ending = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        helpers = [asyncio.create_task(self._drain())]
        if self._listening.stats_interval > 0:
            helpers.append(asyncio.create_task(self._log_stats()))
        try:
            await self.serve(sockets=[listener])
        finally:
            for helper in helpers:
                helper.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """From here on it listens: say where."""
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("serving %s at http://%s:%d", self._front.names[0], shown, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not remembered: the process ends with 0, not by the signal."""
        if self._front.draining:
            self._front.cancel_all()
            self.should_exit = True
            self.force_exit = self.force_exit or sig == signal.SIGINT
        self._front.draining = True
        self._loop.call_soon_threadsafe(self._ending.set)

    async def _drain(self) -> None:
        await self._ending.wait()
        limit = self._listening.drain_timeout
        log.info("draining: %d requests have %g s to end", len(self._front.live), limit)
        end = self._loop.time() + limit
        while self._front.busy and self._loop.time() < end:
            await asyncio.sleep(_AWAKE)
        if self._front.live:
            log.warning("cancelling %d requests", len(self._front.live))
            self._front.cancel_all()
        self.should_exit = True

    async def _log_stats(self) -> None:
        while True:
            await asyncio.sleep(self._listening.stats_interval)
            try:
                stats = await asyncio.to_thread(self._front.engine.stats)
            except Exception as error:
                log.error("no figures: %s", error)
                return
            shown = {name: stats[name] for name in ("requests", "tokens", "latency")}
            log.info("stats %s", json.dumps(shown))


def _most_files() -> int:
    """How many files and sockets this process may have open."""
    try:
        import resource
    except ModuleNotFoundError:  # there is no such limit on Windows
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s", level="WARNING"
    )
    # Pillow warns of broken files, in words of their own for each; Python would keep them all.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("mstar").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel("WARNING")
    logging.getLogger("python_multipart").setLevel("ERROR")  # clients are told what is wrong
