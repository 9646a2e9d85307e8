"""A small model that emits every modality, for tests of the engine and of what is built on it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mstar.engine.node import Node
from mstar.engine.traps import gather, sleep
from mstar.models import registry
from mstar.models.base import Inputs, Model, Setup
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters

PNG = b"\x89PNG\r\n\x1a\n"


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
        for index in range(params["count"]):
            if params["pause"]:
                await sleep(params["pause"])
            if "text" in request.output_modalities:
                request.usage.generated_tokens += 1
                request.emit_text(self.echo(f"{text}{index} "))
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
