"""What every model family implements, and what it is given to load itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mstar.engine.checkpoint import Checkpoint
from mstar.engine.feature_cache import FeatureCache
from mstar.engine.kvcache import KVPool
from mstar.engine.layers.quantized import Quantization
from mstar.engine.lm import DecoderNetwork, LanguageModel
from mstar.engine.memory import kv_tokens_for
from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.engine.weights import load, randomize

__all__ = ["Inputs", "Model", "Run", "Setup", "filled"]

_Network = TypeVar("_Network", bound=nn.Module)


class Run:
    """A walk of its own kind, for `Engine.run`: its value goes to whoever waits for it.

    Args:
        walk: takes the request, returns the value.
    """

    def __init__(self, walk: Callable[[Request], Awaitable[Any]]) -> None:
        self.walk = walk
        self.value: Any = None


@dataclass(frozen=True)
class Inputs:
    """What the caller gave, by modality. Media are lists, empty if there are none."""

    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    images: Sequence[Any] = ()
    audio: Sequence[Any] = ()
    video: Sequence[Any] = ()
    input_modalities: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Setup:
    """How a model is to be loaded.

    Args:
        folders: part of the model -> local folder with its checkpoint.
        device: where it runs.
        dtype: of the large networks; parts that need float32 keep it.
        dummy: random weights of the real shapes; only configs and tokenizers are read.
        kv_tokens: capacity of a KV cache in tokens; None fits it to the free memory.
        memory_fraction: share of the free memory that a KV cache may take.
        max_batch: most sequences in one batch.
        token_budget: most prefill tokens in one batch.
        prefix_cache: keep finished sequences' pages for others with the same beginning.
        look_ahead: see `LanguageModel`.
        quantization: of the layers that the model names; None for none.
        progress: called with (done, total, name) while weights are read.
        options: of the family, by name.
    """

    folders: Mapping[str, Path]
    device: torch.device
    dtype: torch.dtype
    dummy: bool = False
    kv_tokens: int | None = None
    memory_fraction: float = 0.9
    max_batch: int = 64
    token_budget: int = 512
    prefix_cache: bool = True
    look_ahead: bool | None = None
    quantization: Quantization | None = None
    progress: Callable[[int, int, str], None] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def filling(self) -> dict[str, Any]:
        """What `filled` takes, beside a network and its checkpoint."""
        names = ("device", "dtype", "dummy", "quantization", "progress")
        return {name: getattr(self, name) for name in names}

    def language_model(self, name: str, network: DecoderNetwork, **more: Any) -> LanguageModel:
        """A decoder with its cache; `more` is for `LanguageModel`."""
        layout, device, dtype = network.kv_layout, self.device, self.dtype
        most = max(self.max_batch * 8192, 65536)
        tokens = self.kv_tokens or kv_tokens_for(
            layout, device, dtype, fraction=self.memory_fraction, at_most=most
        )
        pool = KVPool(layout, tokens, device=device, dtype=dtype, prefix_cache=self.prefix_cache)
        own = {key: getattr(self, key) for key in ("max_batch", "token_budget", "look_ahead")}
        return LanguageModel(name, network, pool, **own, **more)


def filled(
    network: _Network,
    checkpoint: Callable[[], Checkpoint],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    dummy: bool = False,
    quantization: Quantization | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> _Network:
    """A network, usually from "meta", with its weights, or with random ones if it is a `dummy`; see
    `load` and `randomize`.

    Args:
        checkpoint: opens it.

    Raises:
        WeightsError: a file is missing or wrong, or lacks a tensor.
    """
    how = {"device": device, "dtype": dtype, "quantization": quantization}
    if dummy:
        return randomize(network, **how).eval()
    return load(network, checkpoint(), **how, progress=progress).eval()


class Model:
    """A family: nodes, prompt layout, parameters, walk.

    `load` may take its time; `prepare` runs in the caller's thread; `walk` on the engine's.
    """

    sample_rate: int | None = None  # of the audio it makes, in Hz
    networks: Sequence[nn.Module] = ()
    features: FeatureCache | None = None  # encoded media that it keeps
    options: Sequence[str] = ()  # names of those that `Setup.options` may hold
    quantized: str = ""  # what `Quantization.layers` is, of its networks; none, if empty

    @classmethod
    def load(cls, setup: Setup) -> Model:
        """Build the networks and their nodes."""
        raise NotImplementedError

    @property
    def nodes(self) -> Sequence[Node]:
        """All nodes, for statistics and binding."""
        raise NotImplementedError

    def prepare(self, inputs: Inputs, params: dict[str, Any], outputs: tuple[str, ...]) -> Any:
        """Check what the parameter table cannot check, and lay out the prompt.

        Raises:
            InvalidRequest: the request cannot be served.
        """
        raise NotImplementedError

    async def walk(self, request: Request) -> str | None:
        """Serve one request; returns its finish reason (`"stop"` if None)."""
        raise NotImplementedError

    def examples(self) -> Sequence[Mapping[str, Any]]:
        """Requests, as arguments of `generate`, that run what `warmup` does not: prompts, media,
        codecs. On a GPU the Engine sends them after it, so that nothing is compiled later."""
        return ()

    def policy_of(self, engine: Any, robot: Any, rename: Mapping[str, str] | None) -> Any:
        """What `Engine.policy` returns, of a model that makes actions."""
        raise NotImplementedError

    def world_of(self, engine: Any) -> Any:
        """What has the `methods` of the model's card, for `Engine.encode` and its like."""
        raise NotImplementedError

    def warmup(self) -> None:
        """Run or capture whatever the first request would have to wait for. On the engine's
        thread, before any walk."""
