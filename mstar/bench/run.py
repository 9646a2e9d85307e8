"""A whole run: find the route, warm up, measure, report."""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from mstar.bench.client import run_one
from mstar.bench.connection import Connections
from mstar.bench.find import base_of, find
from mstar.bench.lag import watch_lag
from mstar.bench.load import Load, offer
from mstar.bench.prompts import Prompt, built_in
from mstar.bench.routes import ROUTES, Ask, Request, Route
from mstar.bench.trace import Trace
from mstar.errors import RequestFailed

__all__ = ["Plan", "Run", "run"]

Show = Callable[[str, list[Trace]], None]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        prompts: used in turn; none for the built-in texts.
        warmup: requests before the measured ones, under the same load.
        seed: what request i sends as its seed is `seed + i`; None sends none.
        disconnect: the share of clients that leave, each after a random part of the time that a
            request takes.
    """

    url: str
    load: Load
    route: str = "auto"
    ask: Ask = field(default_factory=Ask)
    prompts: Sequence[Prompt] = ()
    warmup: int = 0
    timeout: float = 600.0
    seed: int | None = None
    disconnect: float = 0.0
    api_key: str | None = None


@dataclass
class Run:
    """What was measured: the requests that ended, over `seconds`, and how late the tool was."""

    plan: Plan
    url: str
    route: str
    model: str | None
    traces: list[Trace]
    warmup: list[Trace]
    seconds: float
    lag: list[float]
    interrupted: bool = False


def run(plan: Plan, show: Show = lambda stage, traces: None) -> Run:
    """Run the plan. Ctrl-C ends it early, with the requests that are done by then.

    Args:
        plan: what.
        show: called now and then with the stage (`warm-up`, `running`) and the requests so far.

    Raises:
        MStarError: the server cannot be reached, refuses the key, or fails every warm-up request.
        KeyboardInterrupt: Ctrl-C came before the measuring began.
    """
    return asyncio.run(_run(plan, show))


async def _run(plan: Plan, show: Show) -> Run:
    base = base_of(plan.url)
    headers = {"accept-encoding": "identity", "user-agent": "mstar-bench"}
    if plan.api_key:
        headers["authorization"] = f"Bearer {plan.api_key}"
    with _stop_on_ctrl_c() as stop:
        async with Connections(base, headers) as connections:
            name, model = await find(connections, plan.route, plan.ask.model)
            route = ROUTES[name](replace(plan.ask, model=model))
            clients = _Clients(plan, connections, route)
            load = replace(plan.load, requests=plan.warmup, seconds=None)
            await clients.run(load, stop, lambda traces: show("warm-up", traces))
            warmup = clients.traces
            _check_warmup(warmup)
            if stop.is_set():
                raise KeyboardInterrupt
            clients = _Clients(plan, connections, route, _typical(warmup))
            gc.freeze()  # collections need not look through what is there already
            try:
                async with watch_lag() as lag:
                    began = time.perf_counter()
                    await clients.run(plan.load, stop, lambda traces: show("running", traces))
                    seconds = time.perf_counter() - began
            finally:
                gc.unfreeze()
    traces = sorted(clients.traces, key=lambda trace: trace.index)
    return Run(plan, base, name, model, traces, warmup, seconds, lag, stop.is_set())


class _Clients:
    """Run the requests of one load; `traces` holds those that have ended.

    Args:
        typical: seconds that a request takes, for clients that leave; None if nobody leaves.
    """

    def __init__(
        self,
        plan: Plan,
        connections: Connections,
        route: Route,
        typical: float | None = None,
    ) -> None:
        self._plan, self._connections, self._route = plan, connections, route
        self._typical = typical
        self._prompts = list(plan.prompts) or built_in(route.use)
        self._requests: dict[int, Request] = {}
        self.traces: list[Trace] = []

    async def run(
        self, load: Load, stop: asyncio.Event, show: Callable[[list[Trace]], None]
    ) -> None:
        """Until the load has ended or `stop` is set."""
        running = asyncio.create_task(offer(load, self.one))
        waiting = asyncio.create_task(stop.wait())
        try:
            ended: set[asyncio.Task] = set()
            while not ended:
                both, first = {running, waiting}, asyncio.FIRST_COMPLETED
                ended, _ = await asyncio.wait(both, timeout=1.0, return_when=first)
                show(self.traces)
        finally:
            waiting.cancel()
            if not running.done():
                running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    async def one(self, index: int, due: float) -> None:
        """One request."""
        request = self._request(index)
        trace = Trace(index, begun=due)
        leave = self._leave_after(index)
        plan = self._plan
        args = (self._connections, self._route, request, trace, plan.timeout, leave)
        await run_one(*args)
        self.traces.append(trace)

    def _request(self, index: int) -> Request:
        """The bytes of a request; made once for each prompt where no seed differs."""
        prompt, seed = index % len(self._prompts), self._plan.seed
        if seed is not None:
            return self._route.request(self._prompts[prompt], seed + index)
        if prompt not in self._requests:
            self._requests[prompt] = self._route.request(self._prompts[prompt], None)
        return self._requests[prompt]

    def _leave_after(self, index: int) -> float | None:
        dice = random.Random(f"{self._plan.load.seed} {index}")
        if self._typical is None or dice.random() >= self._plan.disconnect:
            return None
        return dice.random() * self._typical


def _typical(traces: list[Trace]) -> float:
    """Seconds that a request takes; a second if that is not known."""
    done = [trace for trace in traces if trace.outcome == "done" and trace.sent is not None]
    return statistics.median(trace.end - trace.sent for trace in done) if done else 1.0


def _check_warmup(traces: list[Trace]) -> None:
    if traces and all(trace.outcome == "failed" for trace in traces):
        first = traces[0]
        message = f"all {len(traces)} warm-up requests failed: {first.reason}: {first.message}"
        raise RequestFailed(message)


@contextmanager
def _stop_on_ctrl_c() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C sets; where signals cannot be had, Ctrl-C is left as it is."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, stop.set)
    except (NotImplementedError, RuntimeError, ValueError):
        yield stop
        return
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)
