"""The Engine: one model, run in the caller's own process."""

from __future__ import annotations

import contextlib
import gc
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch

from mstar.client import GenerateMethods
from mstar.engine.handle import Handle, log
from mstar.engine.layers.quantized import warm_quantized
from mstar.engine.listening import merged
from mstar.engine.memory import memory_stats
from mstar.engine.request import Request
from mstar.engine.service import Service
from mstar.engine.stats import node_stats
from mstar.engine.threads import threads_for
from mstar.engine.weights import weight_bytes
from mstar.errors import EngineOverloaded, InvalidRequest, MStarError
from mstar.models import registry
from mstar.models.base import Model, Run
from mstar.models.inputs import gather_inputs, output_modalities_for
from mstar.models.loading import device_for, dtype_for, load_model
from mstar.types import Event, GenerateResult

__all__ = ["Engine", "Handle"]

_LONGEST_TIMEOUT = 10**8


class Engine(GenerateMethods):
    """Loads one model and serves requests from any thread or event loop, batched together.

    Args:
        model: a registry name (`mstar models` lists them; `-tiny` ones ship with the package), a
            hub repository id, or a folder.
        weights: a folder or repository for that model, or a dict part -> folder or repository.
        device: `"cpu"`, `"cuda"`, ...; the GPU if there is one.
        dtype: of the large networks: `"float32"`, `"bfloat16"` or `"float16"`; bfloat16 on a GPU,
            float32 on a CPU if left out.
        quantization: `"int8"` keeps the matrices of the large networks in 8 bits; `"fp8"` also
            rounds what they are multiplied with, and on a GPU needs compute capability 8.9.
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
        options: of the model's family, by name: pi05 takes `statistics`, for example.
        progress: show a bar on stderr while weights are read (default: if that is a terminal).

    Attributes:
        card: what can be known about the model's family.
        name: the registry name or repository that was given; the family's for a folder.

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
        quantization: str | None = None,
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
        options: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ) -> None:
        _check_sizes(
            cpu_threads=cpu_threads,
            max_running=max_running,
            max_queue=max_queue,
            max_batch=max_batch,
            token_budget=token_budget,
            kv_tokens=kv_tokens,
        )
        if not isinstance(memory_fraction, (int, float)) or not 0 < memory_fraction <= 1:
            raise InvalidRequest("memory_fraction", memory_fraction, "must be above 0, at most 1")
        self.device = device_for(device)
        target = registry.find(model, weights)
        self.card = target.card
        self.name = target.name
        self._dtype = dtype_for(dtype, self.device)
        self.model: Model = load_model(
            target,
            device=self.device,
            dtype=self._dtype,
            quantization=quantization,
            load_format=load_format,
            kv_tokens=kv_tokens,
            memory_fraction=memory_fraction,
            max_batch=max_batch,
            token_budget=token_budget,
            prefix_cache=prefix_cache,
            look_ahead=look_ahead,
            options=dict(options or {}),
            progress=progress,
        )
        threads = cpu_threads or threads_for(sum(map(weight_bytes, self.model.networks)))
        self._service = Service(
            partial(_walk, self.model),
            self.model.nodes,
            device=self.device,
            cpu_threads=threads,
            max_running=max_running,
            max_queue=max_queue,
        )
        self._finalizer = weakref.finalize(self, self._service.close)
        if self.device.type == "cuda" if warmup is None else warmup:
            self.warmup()

    # -- generating ------------------------------------------------------------------------------

    def submit(self, *, stream: bool = True, **request: Any) -> Handle:
        """Queue a request and return at once.

        Args:
            stream: make events as early as they can be had, not in large pieces.
            **request: as for `generate`.

        Raises:
            InvalidRequest: the request cannot be served; nothing was queued.
            EngineOverloaded: the queue is full.
            EngineClosed: the engine is closed or has died.
        """
        prepared = self._prepare(stream=stream, **request)
        self._service.submit(prepared)
        return prepared.sink

    def _generate(self, *, stream: bool, **request: Any) -> GenerateResult | Iterator[Event]:
        handle = self.submit(stream=stream, **request)
        if stream:
            return EventStream(handle)
        with _cancelling(handle):
            return handle.result()

    async def agenerate(self, **kwargs: Any) -> GenerateResult:
        """`generate` for an event loop; cancelling the awaiting task cancels the request."""
        handle = self.submit(stream=False, **kwargs)
        with _cancelling(handle):
            async for _ in merged([handle]):
                pass
        return handle.result()

    async def astream(self, **kwargs: Any) -> AsyncIterator[Event]:
        """`generate(stream=True)` for an event loop."""
        handle = self.submit(stream=True, **kwargs)
        with _cancelling(handle):
            async for _, events in merged([handle]):
                for event in events:
                    yield event

    def generate_batch(self, requests: Sequence[Mapping[str, Any]]) -> list[GenerateResult]:
        """Run several requests together; results in the same order.

        If one is invalid, none is run. If one fails, the others are cancelled. There may be more
        than the queue holds.
        """
        prepared = [self._prepare(**{"stream": False, **request}) for request in requests]
        results: list[GenerateResult] = []
        submitted = 0
        try:
            while len(results) < len(prepared):
                while submitted < len(prepared):
                    try:
                        self._service.submit(prepared[submitted])
                    except EngineOverloaded:
                        if submitted == len(results):
                            raise
                        break
                    submitted += 1
                results.append(prepared[len(results)].sink.result())
            return results
        finally:
            for request in prepared[len(results) : submitted]:
                self._service.cancel(request)

    def act(self, **kwargs: Any) -> np.ndarray:
        """Actions of a policy, float32 `[horizon, action_dim]`; arguments as for `generate`."""
        return self.generate(output_modalities=("action",), **kwargs).actions

    def policy(self, robot: Any = None, rename: Mapping[str, str] | None = None) -> Any:
        """A robot's view of a model that acts; see `mstar.models.pi05.policy.RobotPolicy`.

        Args:
            robot: a name (`"droid"`, `"libero"`, `"aloha"`), a `Robot`, or the checkpoint's own;
                of a planner its settings, `{"goal": image, "samples": 100, ...}`.
            rename: key of an observation -> the key that the robot's convention has for it.

        Raises:
            InvalidRequest: the model is no policy, or the robot is not known.
        """
        self._service.check_open()
        if "action" not in self.card.outputs:
            raise InvalidRequest("robot", robot, f"{self.card.name} makes no actions")
        return self.model.policy_of(self, robot, rename)

    # -- world models ----------------------------------------------------------------------------

    def encode(self, frames: Any, **options: Any) -> Any:
        """Latents of a video or an image, kept on the device for `predict`, `rollout` and `plan`;
        see `world.py` and `ac_world.py` in `mstar/models/vjepa2`."""
        return self._world("encode").encode(frames, **options)

    def predict(self, context: Any, *args: Any, **options: Any) -> Any:
        """Latents that the model predicts in one pass."""
        return self._world("predict").predict(context, *args, **options)

    def rollout(self, context: Any, actions: Any, state: Any, **options: Any) -> Any:
        """Latents after each of some actions."""
        return self._world("rollout").rollout(context, actions, state, **options)

    def plan(self, context: Any, goal: Any, state: Any, **options: Any) -> Any:
        """Actions that lead from what the context shows to the goal."""
        return self._world("plan").plan(context, goal, state, **options)

    def run(
        self, walk: Callable[[Request], Awaitable[Any]], *, timeout: float | None = None
    ) -> Any:
        """Run a coroutine function of the request among the model's walks; its value.

        Raises:
            MStarError: as `generate`.
        """
        job = Run(walk)
        self._service.check_open()
        request = self._request(job, {}, (), False, timeout)
        self._service.submit(request)
        with _cancelling(request.sink):
            request.sink.result()
        return job.value

    def _world(self, method: str) -> Any:
        self._service.check_open()
        if method not in self.card.methods:
            having = [card.name for card in registry.cards() if method in card.methods]
            allowed = f"{self.card.name} has no {method}(); {', '.join(having)} have"
            raise InvalidRequest("method", method, allowed)
        return self.model.world_of(self)

    # -- the engine ------------------------------------------------------------------------------

    def warmup(self) -> dict[str, float]:
        """Run or capture beforehand what the first request would wait for.

        Returns:
            `{"seconds": ...}` that it took.
        """
        self._service.check_open()
        began = time.perf_counter()
        self._service.call(partial(warm_quantized, self.model.networks, self._dtype))
        self._service.call(self.model.warmup)
        if self.device.type == "cuda":
            self._run_examples()
        return {"seconds": time.perf_counter() - began}

    def _run_examples(self) -> None:
        for example in self.model.examples():
            try:
                self.submit(**example, stream=False).result()
            except MStarError as error:  # options may leave no room for it
                log.info("%s was not warmed up by an example: %s", self.card.name, error)

    def stats(self) -> dict[str, Any]:
        """Counts and timings since the start, and bytes: requests, nodes, KV caches, tokens,
        latencies, memory.

        Raises:
            EngineClosed: the engine was closed or has died.
        """
        self._service.check_open()
        recorder = self._service.recorder
        running, waiting = self._service.counts()
        return {
            "model": self.card.name,
            "requests": {
                "running": running,
                "waiting": waiting,
                **recorder.requests(),
            },
            "queue_depth": waiting,
            "tokens": recorder.tokens(),
            "latency": recorder.latency(),
            "nodes": {node.name: node_stats(node) for node in self.model.nodes},
            "memory": memory_stats(
                self.device, self.model.networks, self.model.nodes, self.model.features
            ),
        }

    def health(self) -> dict[str, str]:
        """`{"status": "healthy"}`.

        Raises:
            EngineClosed: the engine was closed or has died.
        """
        self._service.check_open()
        return {"status": "healthy"}

    def close(self) -> None:
        """Cancel what is live, end the engine's thread, free the model. May be called twice."""
        self._finalizer()
        self.model = None
        gc.collect()  # networks and the nodes that run them refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(
        self,
        *,
        stream: bool,
        output_modalities: Sequence[str] | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        text: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        images: Any = None,
        audio: Any = None,
        video: Any = None,
        input_modalities: Sequence[str] | None = None,
        **model_kwargs: Any,
    ) -> Request:
        """Check a request in the caller's thread; nothing is queued."""
        self._service.check_open()
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
        prepared = self.model.prepare(inputs, params, outputs)
        return self._request(prepared, params, outputs, stream, timeout, request_id)

    def _request(
        self,
        prepared: Any,
        params: dict[str, Any],
        outputs: tuple[str, ...],
        stream: bool,
        timeout: float | None,
        request_id: str | None = None,
    ) -> Request:
        handle = Handle(request_id or f"req-{uuid.uuid4().hex}")
        request = Request(
            handle.request_id,
            prepared,
            params,
            outputs,
            handle,
            stream=stream,
            timeout=_seconds(timeout),
            sample_rate=self.model.sample_rate,
        )
        handle.usage = request.usage
        handle.cancel_request = lambda: self._service.cancel(request)
        return request


class EventStream(Iterator[Event]):
    """The events of a request as they come. Closing or dropping it early cancels the request."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._events = iter(handle)

    def __next__(self) -> Event:
        with _cancelling(self._handle, StopIteration):
            return next(self._events)

    def close(self) -> None:
        """Take no more events."""
        self._handle.cancel()
        self._events = iter(())

    def __del__(self) -> None:
        if not self._handle.done:
            self._handle.cancel()


async def _walk(model: Model, request: Request) -> str | None:
    if isinstance(request.inputs, Run):
        request.inputs.value = await request.inputs.walk(request)
        return None
    return await model.walk(request)


def _seconds(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not 0 < timeout <= _LONGEST_TIMEOUT:
        allowed = f"must be seconds above 0, at most {_LONGEST_TIMEOUT}, or None for no limit"
        raise InvalidRequest("timeout", timeout, allowed)
    return timeout


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        least = 0 if name == "max_queue" else 1
        if value is None and name in ("kv_tokens", "cpu_threads"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidRequest(name, value, f"must be an integer of at least {least}")


@contextlib.contextmanager
def _cancelling(handle: Handle, *but: type[BaseException]) -> Iterator[None]:
    """Whoever stops waiting for a request early does not want it any more."""
    try:
        yield
    except but:
        raise
    except BaseException:
        handle.cancel()
        raise
