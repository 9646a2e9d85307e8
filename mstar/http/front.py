"""What all routes of one app share."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mstar.http.errors import Refused
from mstar.http.metrics import Metrics
from mstar.http.settings import Settings

__all__ = ["Front", "off_loop"]

# Work on less than this many bytes is done at once: a hop to another thread would take longer.
_SMALL = 64 * 1024
# Few threads, for each one that has something to do delays the event loop's turns.
_WORKERS = ThreadPoolExecutor(2, "mstar-http")


class Front:
    """One engine and how it is shown to the network.

    Args:
        engine: the Engine.
    """

    def __init__(self, engine: Any, settings: Settings) -> None:
        self.engine = engine
        self.card = engine.card
        self.settings = settings
        names = (*settings.served_model_name, engine.name, engine.card.name)
        self.names = tuple(dict.fromkeys(names))  # of the model, on the wire
        self.metrics = Metrics(engine)
        self.draining = False
        self.busy = 0  # requests between their first and their last byte
        self.held = 0  # bytes of the bodies of these requests
        self.live: set[Any] = set()  # handles of the engine

    def check_open(self) -> None:
        """Raise if no new work is taken: draining, or the engine has gone."""
        if self.draining:
            headers = {"connection": "close"}
            raise Refused(503, "the server is shutting down", kind="EngineClosed", headers=headers)
        try:
            self.engine.health()
        except Exception as error:
            raise Refused(503, str(error), kind="EngineClosed") from None

    def cancel_all(self) -> None:
        """End every live request."""
        for handle in list(self.live):
            handle.cancel()


async def off_loop(
    function: Callable[..., Any], *args: Any, size: int = 0, always: bool = False
) -> Any:
    """Call `function` away from the event loop, unless it has only few bytes to work on.

    Args:
        function: what is called, in the context of the caller.
        args: its arguments.
        size: about how many bytes it works on.
        always: away from the loop, however few they are.
    """
    if size < _SMALL and not always:
        return function(*args)
    run = contextvars.copy_context().run
    return await asyncio.get_running_loop().run_in_executor(_WORKERS, run, function, *args)
