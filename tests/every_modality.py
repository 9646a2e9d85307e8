"""A small model that emits every modality, for tests of the engine and of what is built on it."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mstar.engine.node import Node
from mstar.engine.traps import gather, sleep
from mstar.models import registry
from mstar.models.base import Inputs, Model, Setup
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters

PNG = b"\x89PNG\r\n\x1a\n"


def picture(width: int, height: int, shade: int) -> bytes:
    """A PNG of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), (shade, shade // 2, 255 - shade)).save(out, "PNG")
    return out.getvalue()


def described(value: Any) -> Any:
    """Plain data that says what arrived; of bytes, their number and the start of their hash."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes {hashlib.sha256(value).hexdigest()[:8]}"
    if isinstance(value, dict):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    return value


class EveryModality(Model):
    """Emits what is asked for, `count` times; a few parameters make it misbehave."""

    sample_rate = 24000

    def __init__(self) -> None:
        self.open_walks = 0
        self.gate = threading.Event()
        self.echo = Node("echo", self._echo)

    @classmethod
    def load(cls, setup: Setup) -> EveryModality:
        return cls()

    @property
    def nodes(self):
        return (self.echo,)

    def _echo(self, batch: list) -> list:
        if any(value == "poison" for value in batch):
            raise ZeroDivisionError("poison in the batch")
        if any(value == "kill" for value in batch):
            raise SystemExit("the node left")
        return batch

    def prepare(self, inputs: Inputs, params: dict, outputs: tuple[str, ...]) -> Inputs:
        return inputs

    async def walk(self, request) -> str:
        self.open_walks += 1
        try:
            return await self._walk(request)
        finally:
            self.open_walks -= 1

    async def _walk(self, request) -> str:
        params, text = request.params, request.inputs.text or ""
        await self.echo(text)
        if params["hang"]:
            await sleep(3600)
        if params["tell"]:
            told = {name: value for name, value in vars(request.inputs).items() if value}
            told = {**told, "outputs": request.output_modalities, "params": params}
            request.emit_text(json.dumps(described(told)))
            return "stop"
        request.usage.prompt_tokens = len(text)
        if params["width"] is not None:
            return await self._draw(request, params)
        limit = params["max_output_tokens"]
        for index in range(params["count"]):
            if limit is not None and index == limit:
                return "length"
            if params["pause"]:
                await sleep(params["pause"])
            if "text" in request.output_modalities:
                request.usage.generated_tokens += 1
                piece = f"{text}{index} "
                if any(word in piece for word in params["stop"] or ()):
                    return "stop"
                if params["logprobs"] is None:
                    request.emit_text(self.echo(piece))
                else:
                    request.emit_text(piece, logprobs=logprobs_of(piece, params["logprobs"]))
            if "audio" in request.output_modalities:
                request.emit_audio(np.full(240, index, dtype=np.int16), self.sample_rate)
            if "image" in request.output_modalities:
                (png,) = await gather(self.echo(PNG + bytes([index])))
                request.emit_image(png, index=index)
            if "action" in request.output_modalities:
                request.emit_actions(np.full((2, 7), index, dtype=np.float32))
            if "latent" in request.output_modalities:
                request.emit_latents(np.full((1, 3, 4), index, dtype=np.float32))
            if params["late_poison"]:
                request.emit_text(self.echo("poison"))
                await sleep(3600)
        return "stop"

    async def _draw(self, request, params) -> str:
        """An image of the asked size, whose colour is the seed; with previews on the way."""
        width, height, steps = params["width"], params["height"], params["steps"]
        shade = (params["seed"] or 0) % 256
        for step in range(1, steps + 1):
            await sleep(params["pause"])
            if params["preview_every"] and step % params["preview_every"] == 0 and step < steps:
                preview = picture(width // 2, height // 2, shade)
                request.emit_progress(step, steps, preview)
        request.usage.generated_tokens = steps
        request.emit_image(picture(width, height, shade))
        return "stop"


def logprobs_of(piece: str, top: int) -> list[dict[str, Any]]:
    """What a model tells of one token; `top` alternatives."""
    token = {"token": piece, "logprob": -0.5, "bytes": list(piece.encode())}
    others = [{"token": str(i), "logprob": -1.0 - i, "bytes": [48 + i]} for i in range(top)]
    return [{**token, "top_logprobs": others}]


def mask_bytes(value: Any) -> bytes:
    """`mask`: an image file."""
    if not isinstance(value, bytes):
        raise ValueError("must be bytes")
    return value


def words(value: Any) -> list[str]:
    """`stop`: strings."""
    return [value] if isinstance(value, str) else list(value)


CARD = ModelCard(
    name="every",
    title="a test model",
    entry="tests.every_modality:EveryModality",
    inputs=("text", "image", "audio", "video"),
    outputs=("text", "audio", "image", "action", "latent"),
    parameters=Parameters(
        "every",
        [
            Parameter("count", int, 3, low=0),
            Parameter("pause", float, 0.0, low=0),
            Parameter("hang", bool, False),
            Parameter("late_poison", bool, False),
            Parameter("tell", bool, False),
            Parameter("seed", int, nullable=True, low=0, high=2**63 - 1),
            Parameter("temperature", float, 1.0, low=0, high=2),
            Parameter("top_p", float, 1.0, low=0, high=1),
            Parameter("top_k", int, 0, low=0),
            Parameter("frequency_penalty", float, 0.0, low=-2, high=2),
            Parameter("max_output_tokens", int, nullable=True, low=1, aliases=("max_tokens",)),
            Parameter("min_tokens", int, 0, low=0),
            Parameter("stop", words, nullable=True, accepts="a string or a list of strings"),
            Parameter("ignore_eos", bool, False),
            Parameter("logprobs", int, nullable=True, low=0, high=20),
            Parameter("voice", str, "Ethan", choices=("Ethan", "Chelsie")),
            Parameter("width", int, nullable=True, low=16, high=1024),
            Parameter("height", int, nullable=True, low=16, high=1024),
            Parameter("steps", int, 8, low=1, aliases=("num_timesteps",)),
            Parameter("preview_every", int, 0, low=0),
            Parameter("mask", mask_bytes, nullable=True, accepts="the bytes of an image file"),
        ],
    ),
    repos={},
    chat=True,
)


@pytest.fixture
def every(monkeypatch):
    """The registry knows the model as `every`."""
    monkeypatch.setitem(registry._BUILTIN, "every", "tests.every_modality:CARD")
    return "every"
