from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from qwen_loop import Loop
from safetensors.torch import load_file

DATA = Path(__file__).parents[2] / "data" / "qwen3_omni"
# Largest differences by a part of a tensor's name; others are 5e-4, integers none.
_NEAR = {"audio0.features": 2e-4, "wav": 1e-4, "position_ids": 0.0}


class Goldens(dict):
    """The published results by name, and the facts beside them."""

    def __init__(self) -> None:
        super().__init__(load_file(DATA / "goldens.safetensors"))
        self.facts = json.loads((DATA / "goldens.json").read_text())
        self.cases = self.facts["cases"]

    def check(self, name: str, found: torch.Tensor) -> None:
        """Compare `found` with the tensor of that name."""
        expected = self[name]
        assert found.shape == expected.shape, name
        if not expected.is_floating_point():
            assert found.tolist() == expected.tolist(), name
            return
        near = next((near for part, near in _NEAR.items() if part in name), 5e-4)
        torch.testing.assert_close(
            found, expected, atol=near, rtol=0, msg=lambda text: f"{name}: {text}"
        )


@pytest.fixture(scope="session")
def goldens() -> Goldens:
    return Goldens()


@pytest.fixture(scope="session")
def loop() -> Loop:
    with torch.inference_mode():
        return Loop()


@pytest.fixture(autouse=True)
def inference():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are so small that a second one only gets in the way
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)
