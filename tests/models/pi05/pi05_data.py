"""The goldens, and where things are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from mstar import Engine
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


def asked(goldens: Goldens, row: int, missing=(), noise=None, **params) -> dict:
    """Arguments of `Engine.generate` for an observation of the goldens."""
    seen = goldens.observation(row, tuple(missing))
    start = goldens["pair.noise"][row if noise is None else noise].numpy()
    request = {"text": seen["task"], "images": seen["images"], "robot_state": seen["state"]}
    return {**request, "noise": start, **params}


def every_case(goldens: Goldens) -> dict[str, tuple[dict, torch.Tensor, float]]:
    """Name -> arguments, what is expected, how near."""
    facts, cases = goldens.facts, {}
    for row, missing in enumerate([facts["pair"]["missing_cameras"]] * 2):
        for name, raw in (("actions_norm", True), ("actions", False)):
            expected = goldens[f"pair.{name}"][row]
            cases[f"{name} {row}"] = asked(goldens, row, missing, raw=raw), expected, 5e-5
    for steps in (1, 4, 10):
        expected = goldens[f"single_full.actions_norm_steps{steps}"][0]
        request = asked(goldens, 1, noise=0, num_steps=steps, raw=True)
        cases[f"{steps} steps"] = request, expected, 5e-5
    names = facts["pair"]["reference_camera_slot_order"]
    for row, mask in enumerate(facts["per_sample_mask"]["image_masks"]):
        missing = [name for name, there in zip(names, mask, strict=True) if not there]
        expected = goldens["per_sample_mask.actions_norm"][row]
        cases[f"masked {row}"] = asked(goldens, row, missing, raw=True), expected, 5e-5
    rtc = facts["rtc"]
    left = {
        "prev_chunk_left_over": goldens["rtc.prev_chunk_left_over"],
        "inference_delay": rtc["inference_delay"],
        "raw": True,
    }
    for schedule in rtc["schedules"]:
        guidance = {
            "rtc_mode": "guided",
            "prefix_attention_schedule": schedule,
            "execution_horizon": rtc["execution_horizon"],
            "max_guidance_weight": rtc["max_guidance_weight"],
        }
        request = asked(goldens, 0, rtc["missing_cameras"], **left, **guidance)
        expected = goldens[f"rtc.{schedule}.actions_norm"][0, :, :7]
        cases[f"guided {schedule}"] = request, expected, 2e-4
    expected = goldens["rtc_trained.actions_norm"][0, :, :7]
    cases["trained"] = asked(goldens, 0, rtc["missing_cameras"], **left), expected, 5e-5
    return cases


def picture(file: str) -> np.ndarray:
    """Bytes `[height, width, 3]` of a PNG of the goldens."""
    return np.array(Image.open(DATA / Path(file).name).convert("RGB"))


def check_alone_and_together(engine: Engine, goldens: Goldens, node: str) -> dict[str, int]:
    """Every golden by itself, then all at once, to the same bits; the calls and batches of a node
    in the second round."""
    cases = every_case(goldens)
    alone = {}
    for name, (request, expected, near) in cases.items():
        alone[name] = engine.generate(**request).actions
        np.testing.assert_allclose(alone[name], expected, atol=near, rtol=0, err_msg=name)
    before = engine.stats()["nodes"][node]
    handles = {name: engine.submit(**request) for name, (request, *_) in reversed(cases.items())}
    for name, handle in handles.items():
        assert np.array_equal(handle.result().actions, alone[name]), name
    after = engine.stats()["nodes"][node]
    return {name: after[name] - before[name] for name in ("calls", "batches")}
