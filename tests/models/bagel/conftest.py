from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bagel_loop import Loop
from PIL import Image
from safetensors.torch import load_file

from mstar.io.rgb import to_rgb

DATA = Path(__file__).parents[2] / "data" / "bagel"


class Goldens(dict):
    """The published results by name, the facts beside them, and how close is close enough."""

    def __init__(self) -> None:
        super().__init__(load_file(DATA / "goldens.safetensors"))
        self.facts = json.loads((DATA / "goldens.json").read_text())
        self.cases = self.facts["cases"]
        self.compared: set[str] = set()

    def check(self, name: str, found: torch.Tensor) -> None:
        """Compare `found` with the tensor of that name, as its kind of tolerance says."""
        expected, kind = self[name], self.facts["tensors"][name]["tolerance"]
        assert found.shape == expected.shape, name
        assert found.dtype == expected.dtype, name
        self.compared.add(name)
        if kind == "u8":
            off = (found.int() - expected.int()).abs()
            assert off.max() <= 1, name
            assert (off > 0).float().mean() <= 0.002, name
            return
        near = {"exact": 0.0, "input": 1e-5, "f32": 1e-4, "f32_traj": 5e-4}[kind]
        torch.testing.assert_close(
            found, expected, atol=near, rtol=near, msg=lambda text: f"{name}: {text}"
        )

    def check_all(self, case: str, seen: dict[str, torch.Tensor]) -> list[str]:
        """Compare everything that both sides have of a case; returns the names."""
        names = [name for name in self if name.split(".")[0] == case]
        found = [name for name in names if name.removeprefix(f"{case}.") in seen]
        for name in found:
            self.check(name, seen[name.removeprefix(f"{case}.")])
        return found


@pytest.fixture(scope="session")
def goldens() -> Goldens:
    return Goldens()


@pytest.fixture(scope="session")
def pictures() -> dict[str, Image.Image]:
    return {name: to_rgb(Image.open(DATA / name)) for name in ("image0.png", "image1.png")}


@pytest.fixture(scope="session")
def loop() -> Loop:
    with torch.inference_mode():
        return Loop.of_the_tiny_checkpoint()


@pytest.fixture(autouse=True)
def inference():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are so small that a second one only gets in the way
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)
