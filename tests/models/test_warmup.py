"""Whatever kernel a request runs, warming up has run it: nothing is compiled once an engine is
ready. Here each kernel tells that it would be launched, and its plain reference runs instead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from mstar import Engine
from mstar.engine.kernels import dispatch

PICTURE = Image.radial_gradient("L").resize((90, 60)).convert("RGB")
SOUND = (np.sin(np.arange(12000) / 9).astype("f4"), 16000)
LONG = "Somebody says this, and a little more than that. " * 4
SAID = {"text": LONG, "seed": 1, "max_output_tokens": 8}
DRAWN = {"output_modalities": ("image",), "num_timesteps": 4, "seed": 1}
VIDEO = np.zeros((8, 48, 64, 3), np.uint8)

REQUESTS: dict[str, list[dict[str, Any]]] = {
    "orpheus": [
        {"text": LONG, "seed": 1, "max_output_tokens": 140},
        {"text": "No.", "temperature": 0.0, "max_output_tokens": 70},
    ],
    "qwen3_omni": [
        {**SAID, "images": [PICTURE, PICTURE.rotate(90)]},
        {**SAID, "video": VIDEO, "temperature": 0.7, "top_p": 0.9},
        {**SAID, "audio": SOUND, "output_modalities": ("text", "audio"), "talker_max_tokens": 12},
        {"text": "Aloud.", "output_modalities": ("audio",), "seed": 2, "talker_max_tokens": 12},
    ],
    "bagel": [
        {**SAID, "images": PICTURE},
        {**DRAWN, "text": LONG, "height": 64, "width": 96},
        {**DRAWN, "text": "Blue.", "images": PICTURE, "cfg_img_scale": 1.5},
        {**DRAWN, "text": "Red.", "output_modalities": ("text", "image"), "max_think_tokens": 4},
    ],
    "vjepa2": [{"images": PICTURE}, {"video": VIDEO}],
}


def watched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """The kernels that would have been launched: their function, dtype and, of attention, kinds."""
    real = dispatch.use_triton
    found: set[tuple[Any, ...]] = set()

    def use_triton(x: Tensor) -> bool:
        caller = sys._getframe(1)
        name = f"{caller.f_globals['__name__']}.{caller.f_code.co_name}"
        given = caller.f_locals
        more = [k for k in ("residual", "activation", "added", "norms") if given.get(k) is not None]
        batch = given.get("batch")
        if batch is not None:
            more += sorted({n > 1 for n in batch.query_lens})
        found.add((name, x.dtype, *more))
        return False

    loaded = [module for name, module in sys.modules.items() if name.startswith("mstar.")]
    for module in loaded:
        if module is not dispatch and vars(module).get("use_triton") is real:
            monkeypatch.setattr(module, "use_triton", use_triton)
    monkeypatch.setattr("mstar.engine.layers.moe._FEW", -1)  # another way on a CPU
    return found


def during(launched: set[Any], run: Callable[[], object]) -> set[Any]:
    launched.clear()
    run()
    return set(launched)


@pytest.mark.parametrize("family", REQUESTS)
def test_requests_run_no_kernel_that_warming_up_has_not_run(family: str, monkeypatch) -> None:
    with Engine(f"{family}-tiny") as engine:
        launched = watched(monkeypatch)

        def warm() -> None:
            engine.warmup()
            for example in engine.model.examples():  # as an Engine on a GPU does
                engine.generate(**example)

        ready = during(launched, warm)
        assert ready
        for request in REQUESTS[family]:
            later = during(launched, lambda request=request: engine.generate(**request))
            assert later <= ready, request


def test_an_example_that_cannot_be_served_does_not_keep_an_engine_from_starting(
    monkeypatch,
) -> None:
    with Engine("qwen3_omni-tiny", options={"speech": False}) as engine:
        examples = engine.model.examples()
        assert [example["output_modalities"] for example in examples] == [("text",)]
        bad = {"text": "a", "temperature": -1.0}
        monkeypatch.setattr(engine.model, "examples", lambda: [bad, *examples])
        engine._run_examples()
        assert engine.stats()["requests"]["completed"] == len(examples)
