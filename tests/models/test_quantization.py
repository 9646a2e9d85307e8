"""Every model with weights of 8 bits: what it saves and how far the results move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mstar import Engine, InvalidRequest
from mstar.cli import app
from mstar.models import registry

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Errors of int8 and of fp8 that were measured are below these; those of bfloat16 are about int8's.
BOUNDS = {
    "orpheus": (0.05, 0.26),
    "bagel": (0.03, 0.14),
    "qwen3_omni": (0.18, 0.42),  # a router that chooses another expert changes all that follows
    "pi05": (0.015, 0.07),
    "vjepa2": (0.013, 0.08),
    "vjepa2_ac": (0.02, 0.11),
}


@pytest.mark.parametrize("model", BOUNDS)
def test_errors_are_bounded_and_weights_are_smaller(model: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quantization

    rows = quantization.measure(model, kinds=("int8", "fp8"))
    assert {row["kind"] for row in rows} == {"int8", "fp8"}
    for row in rows:
        assert row["layers"] > 0
        assert row["bytes"] < row["of"]
        assert 0 < row["error"] < BOUNDS[model][row["kind"] == "fp8"], row
        assert row.get("agree", 1) > (0.85 if row["kind"] == "int8" else 0.55), row


@pytest.mark.gpu
@pytest.mark.parametrize("model", BOUNDS)
def test_errors_are_bounded_on_a_gpu(model: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quantization

    can = torch.cuda.get_device_capability() >= (8, 9)
    kinds = ("int8", "fp8") if can else ("int8",)
    for row in quantization.measure(model, "cuda", kinds, dtype="bfloat16"):
        assert row["error"] < 2 * BOUNDS[model][row["kind"] == "fp8"], row


def test_every_model_names_its_layers() -> None:
    for card in registry.cards():
        if card.name in BOUNDS:
            assert card.load_class().quantized


def test_a_request_gets_the_same_alone_and_in_a_batch() -> None:
    with Engine("orpheus-tiny", device="cpu", quantization="int8") as engine:
        asked = [{"text": f"Say {n}", "seed": n, "max_tokens": 40} for n in range(4)]
        alone = [engine.generate(**one).audio for one in asked]
        assert any(len(one) for one in alone)
        together = [result.audio for result in engine.generate_batch(asked)]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.to_numpy(), other.to_numpy(), atol=1e-4)


def test_what_cannot_be_is_refused_with_the_reason(monkeypatch) -> None:
    with pytest.raises(InvalidRequest, match=r"quantization.*must be 'int8' or 'fp8'"):
        Engine("pi05-tiny", device="cpu", quantization="int4")
    model = registry.get("pi05").load_class()
    monkeypatch.setattr(model, "quantized", "")
    with pytest.raises(InvalidRequest, match="pi05 has no layers that can be quantised"):
        Engine("pi05-tiny", device="cpu", quantization="int8")


def test_the_command_line_takes_it() -> None:
    words = ["generate", "qwen3_omni-tiny", "Hello", "-s", "max_tokens=2", "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--quantization", "int8"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, [*words, "--quantization", "int9"])
    assert done.exit_code != 0
    assert "must be 'int8' or 'fp8'" in " ".join(done.output.split())
