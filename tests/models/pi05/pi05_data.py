"""The goldens, and where things are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from mstar.models import pi05

DATA = Path(__file__).parents[2] / "data" / "pi05"
TINY = Path(pi05.__file__).parent / "tiny" / "pi05"
FULL = Path(pi05.__file__).parent / "full" / "pi05"


class Goldens(dict):
    """The published results by name, and the facts beside them."""

    def __init__(self) -> None:
        super().__init__(load_file(DATA / "goldens.safetensors"))
        self.facts = json.loads((DATA / "goldens.json").read_text())

    def check(self, name: str, found: torch.Tensor, near: float = 5e-5) -> None:
        """Compare `found` with the tensor of that name, absolutely; 0 is exactly."""
        expected = self[name]
        assert found.shape == expected.shape, name
        torch.testing.assert_close(
            found.to(expected.dtype), expected, atol=near, rtol=0, msg=lambda m: f"{name}: {m}"
        )

    def observation(self, row: int, missing: tuple[str, ...] = ()) -> dict:
        """Arguments of `Processor.prepare`."""
        facts = self.facts["observations"][row]
        images = {
            name.removeprefix("observation.images."): picture(file)
            for name, file in facts["images"].items()
            if name not in missing
        }
        return {"images": images, "state": facts["state"], "task": facts["task"]}


def picture(file: str) -> np.ndarray:
    """Bytes `[height, width, 3]` of a PNG of the goldens."""
    return np.array(Image.open(DATA / Path(file).name).convert("RGB"))
