"""The Engine: one model, run in the caller's own process."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch

from mstar.client import GenerateMethods
from mstar.engine.handle import Handle
from mstar.engine.memory import is_out_of_memory
from mstar.engine.request import Request
from mstar.engine.runtime import Runtime
from mstar.engine.stats import Recorder, node_stats
from mstar.engine.threads import threads_for, use_threads
from mstar.engine.weights import weight_bytes
from mstar.errors import EngineClosed, EngineOverloaded, InvalidRequest, RequestCancelled
from mstar.models import registry
from mstar.models.base import Model
from mstar.models.inputs import gather_inputs, output_modalities_for
from mstar.models.loading import device_for, load_model
from mstar.types import Event, GenerateResult

__all__ = ["Engine", "Handle"]

log = logging.getLogger("mstar")


class Engine(GenerateMethods):
    """Loads one model and serves requests from any thread or event loop, batched together.

    Args:
        model: a registry name (`mstar models` lists them; `-tiny` ones ship with the package), a
            hub repository id, or a folder.
        weights: a folder or repository for that model, or a dict part -> folder or repository.
        device: `"cpu"`, `"cuda"`, ...; the GPU if there is one.
        dtype: of the large networks: `"float32"`, `"bfloat16"` or `"float16"`; bfloat16 on a GPU,
            float32 on a CPU if left out.
        load_format: `"auto"`, or `"dummy"` for random weights of the real shapes.
        kv_tokens: size of the KV cache in tokens; fitted to the free memory if left out.
        memory_fraction: share of the free device memory that the KV cache may take.
        max_batch: most sequences in one batch of a decoder.
        token_budget: most prompt tokens in one batch of a decoder.
        max_running: most requests that run at a time.
        max_queue: most requests that wait; beyond that `EngineOverloaded` is raised.
        prefix_cache: reuse the KV cache of common beginnings.
        look_ahead: launch the next decode step before the last token is read (default: on a GPU).
        cpu_threads: threads that operations on a CPU use; if left out, one for a small model and
            torch's own setting otherwise. Other threads of the process keep theirs.
        warmup: run or capture beforehand what the first request would wait for (default: on a
            GPU, whose decode steps are only replayed once they were captured).
        progress: show a bar on stderr while weights are read (default: if that is a terminal).

    Raises:
        ModelNotFound: no such model, folder or repository.
        WeightsError: the checkpoint does not fit.
    """

    def __init__(
        self,
        model: str | PathLike,
        *,
        weights: str | PathLike | Mapping[str, str | PathLike] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        load_format: str = "auto",
        kv_tokens: int | None = None,
        memory_fraction: float = 0.9,
        max_batch: int = 64,
        token_budget: int = 512,
        max_running: int = 256,
        max_queue: int = 1024,
        prefix_cache: bool = True,
        look_ahead: bool | None = None,
        cpu_threads: int | None = None,
        warmup: bool | None = None,
        progress: bool | None = None,
    ) -> None:
        _check_sizes(
            cpu_threads=cpu_threads,
            max_running=max_running,
            max_batch=max_batch,
            token_budget=token_budget,
            kv_tokens=kv_tokens,
        )
        if max_queue < 0:
            raise InvalidRequest("max_queue", max_queue, "must be at least 0")
        if not 0 < memory_fraction <= 1:
            raise InvalidRequest("memory_fraction", memory_fraction, "must be above 0, at most 1")
        self.device = device_for(device)
        target = registry.find(model, weights)
        self.card = target.card
        self.model: Model = load_model(
            target,
            device=self.device,
            dtype=dtype,
            load_format=load_format,
            kv_tokens=kv_tokens,
            memory_fraction=memory_fraction,
            max_batch=max_batch,
            token_budget=token_budget,
            prefix_cache=prefix_cache,
            look_ahead=look_ahead,
            progress=progress,
        )
        self.max_running = max_running
        self.max_queue = max_queue
        self._threads = cpu_threads or threads_for(sum(map(weight_bytes, self.model.networks)))
        self._runtime = Runtime(is_out_of_memory=is_out_of_memory, lane_context=self._lane)
        for node in self.model.nodes:
            node.bind(self._runtime.schedule)
        self._lock = threading.Lock()
        self._live: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._running = 0
        self._recorder = Recorder()
        self._closed = False
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="mstar-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        if self.device.type == "cuda" if warmup is None else warmup:
            self.warmup()

    # -- generating ------------------------------------------------------------------------------

    def submit(
        self,
        *,
        text: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        images: Any = None,
        audio: Any = None,
        video: Any = None,
        output_modalities: Sequence[str] | None = None,
        input_modalities: Sequence[str] | None = None,
        stream: bool = True,
        request_id: str | None = None,
        timeout: float | None = None,
        **model_kwargs: Any,
    ) -> Handle:
        """Queue a request and return at once. Arguments as for `generate`.

        Raises:
            InvalidRequest: the request cannot be served; nothing was queued.
            EngineOverloaded: the queue is full.
            EngineClosed: the engine is closed or has died.
        """
        inputs = gather_inputs(
            self.card,
            text=text,
            messages=messages,
            images=images,
            audio=audio,
            video=video,
            input_modalities=input_modalities,
        )
        outputs = output_modalities_for(self.card, output_modalities)
        params = self.card.parameters.validate(model_kwargs)
        if request_id is not None and (not isinstance(request_id, str) or not request_id):
            raise InvalidRequest("request_id", request_id, "must be a string that is not empty")
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
            raise InvalidRequest("timeout", timeout, "must be a number of seconds above 0")
        self._check_open()
        prepared = self.model.prepare(inputs, params, outputs)
        handle = Handle(request_id or f"req-{uuid.uuid4().hex}")
        request = Request(
            handle.request_id,
            prepared,
            params,
            outputs,
            handle,
            stream=stream,
            timeout=timeout,
            sample_rate=self.model.sample_rate,
        )
        request.on_end = self._ended
        handle.cancel_request = lambda: self._runtime.post(self._cancel, request)
        with self._lock:
            self._check_open()
            if request.id in self._live:
                raise InvalidRequest("request_id", request.id, "a live request has this id")
            if len(self._live) >= self.max_running + self.max_queue:
                self._recorder.rejected += 1
                raise EngineOverloaded(
                    f"{len(self._live)} requests are running or waiting, the limit is "
                    f"{self.max_running} + {self.max_queue}"
                )
            self._live[request.id] = request
            self._runtime.post(self._admit, request)
        return handle

    def generate(
        self,
        *,
        text: str | None = None,
        images: Any = None,
        audio: Any = None,
        video: Any = None,
        output_modalities: Sequence[str] | None = None,
        input_modalities: Sequence[str] | None = None,
        stream: bool = False,
        request_id: str | None = None,
        **model_kwargs: Any,
    ) -> GenerateResult | Iterator[Event]:
        """Run one request.

        Args:
            text: the prompt. Chat models take `messages=[{"role", "content"}]` instead.
            images, audio, video: a path, bytes, `(filename, bytes)`, a list of those; PIL images
                and arrays, too (audio as `(samples, sample_rate)`).
            output_modalities: what to make; the model's default if left out.
            input_modalities: the order of the given parts, where it matters.
            stream: return an iterator of events; closing it cancels the request.
            request_id: unique among the live requests; made up if left out.
            timeout: seconds after which `RequestTimeout` is raised.
            **model_kwargs: parameters of the model (`mstar models NAME` lists them).

        Returns:
            The folded result, or the iterator.

        Raises:
            MStarError: see `mstar.errors`.
        """
        handle = self.submit(
            text=text,
            images=images,
            audio=audio,
            video=video,
            output_modalities=output_modalities,
            input_modalities=input_modalities,
            stream=stream,
            request_id=request_id,
            **model_kwargs,
        )
        if stream:
            return _events(handle)
        with _cancelling(handle):
            return handle.result()

    async def agenerate(self, **kwargs: Any) -> GenerateResult:
        """`generate` for an event loop; cancelling the awaiting task cancels the request."""
        handle = self.submit(stream=False, **kwargs)
        async for _ in _async_events(handle):
            pass
        return handle.result()

    async def astream(self, **kwargs: Any) -> AsyncIterator[Event]:
        """`generate(stream=True)` for an event loop."""
        async for event in _async_events(self.submit(stream=True, **kwargs)):
            yield event

    def generate_batch(self, requests: Sequence[Mapping[str, Any]]) -> list[GenerateResult]:
        """Run several requests together; results in the same order.

        If one is invalid, none is run. If one fails, the others are cancelled.
        """
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(self.submit(**{"stream": False, **request}))
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()

    def act(self, **kwargs: Any) -> np.ndarray:
        """Actions of a policy, float32 `[horizon, action_dim]`; arguments as for `generate`."""
        return self.generate(output_modalities=("action",), **kwargs).actions

    # -- the engine ------------------------------------------------------------------------------

    def warmup(self) -> dict[str, float]:
        """Run or capture beforehand what the first request would wait for.

        Returns:
            `{"seconds": ...}` that it took.
        """
        self._check_open()
        began = time.perf_counter()
        done = threading.Event()
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self.model.warmup()
            except BaseException as error:
                failure.append(error)
            finally:
                done.set()

        self._runtime.post(work)
        while not done.wait(0.1):
            self._check_open()
        if failure:
            raise failure[0]
        return {"seconds": time.perf_counter() - began}

    def stats(self) -> dict[str, Any]:
        """Counts and timings since the start: requests, nodes, KV caches, tokens, latencies."""
        with self._lock:
            running, live = self._running, len(self._live)
        return {
            "model": self.card.name,
            "requests": {
                "running": running,
                "waiting": live - running,
                **self._recorder.requests(),
            },
            "queue_depth": live - running,
            "tokens": self._recorder.tokens(),
            "latency": self._recorder.latency(),
            "nodes": {node.name: node_stats(node) for node in self.model.nodes},
        }

    def health(self) -> dict[str, str]:
        """`{"status": "healthy"}`.

        Raises:
            EngineClosed: the engine was closed or has died.
        """
        self._check_open()
        return {"status": "healthy"}

    def close(self) -> None:
        """Cancel what is live, end the engine's thread, free the model. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        self._runtime.post(self._stop_all, RequestCancelled("the engine was closed"))
        self._runtime.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._stop_all(RequestCancelled("the engine was closed"))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside, on the engine's thread ------------------------------------------------------------

    def _serve(self) -> None:
        try:
            use_threads(self._threads)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            with torch.inference_mode():
                self._runtime.run()
        except BaseException as error:
            log.exception("the engine's thread died")
            self._death = error
            failure = EngineClosed(f"the engine died: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._stop_all(failure)

    @contextlib.contextmanager
    def _lane(self) -> Iterator[None]:
        """What runs beside the engine's thread has a share of the cores, or a stream of its own."""
        use_threads(max(1, self._threads // 4))
        side = contextlib.nullcontext()
        if self.device.type == "cuda":
            side = torch.cuda.stream(torch.cuda.Stream(self.device))
        with torch.inference_mode(), side:
            yield

    def _admit(self, request: Request) -> None:
        request.arm(self._runtime)
        self._waiting.append(request)
        self._begin_waiting()

    def _begin_waiting(self) -> None:
        while self._waiting and self._running < self.max_running:
            request = self._waiting.popleft()
            if request.state == "queued":
                self._running += 1
                request.begin(self._runtime, self.model.walk)

    def _cancel(self, request: Request) -> None:
        request.stop(RequestCancelled(f"request {request.id} was cancelled"))

    def _ended(self, request: Request, was: str) -> None:
        with self._lock:
            self._live.pop(request.id, None)
        if was == "running":
            self._running -= 1
        elif request in self._waiting:
            self._waiting.remove(request)
        self._recorder.record(request)
        self._begin_waiting()

    def _stop_all(self, error: BaseException) -> None:
        self._waiting.clear()
        for request in list(self._live.values()):
            request.stop(error)

    def _check_open(self) -> None:
        if self._death is not None:
            raise EngineClosed(f"the engine died: {self._death}") from self._death
        if self._closed:
            raise EngineClosed("the engine is closed")


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InvalidRequest(name, value, "must be at least 1")


def _events(handle: Handle) -> Iterator[Event]:
    with _cancelling(handle):
        yield from handle


@contextlib.contextmanager
def _cancelling(handle: Handle) -> Iterator[None]:
    """Whoever stops waiting for a request early does not want it any more."""
    try:
        yield
    except BaseException:
        handle.cancel()
        raise


async def _async_events(handle: Handle) -> AsyncIterator[Event]:
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(changed.set)

    handle.listen(tell)
    index = 0
    try:
        while True:
            changed.clear()
            events, done = handle.taken(index)
            for event in events:
                yield event
            index += len(events)
            if done:
                break
            await changed.wait()
    except BaseException:
        handle.cancel()
        raise
    handle.raise_for_error()
