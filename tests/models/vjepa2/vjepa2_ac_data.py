"""The goldens of V-JEPA 2-AC, and the small networks that they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mstar.models.vjepa2.ac_predictor import Frames
from mstar.models.vjepa2.card_ac import CARD
from mstar.models.vjepa2.networks import AcNetworks, load_ac_networks

DATA = Path(__file__).parents[2] / "data" / "vjepa2"
TINY = CARD.tiny / "vjepa2_ac"
_PREFIX = "tiny_vjepa2_ac/"
_CEM = json.loads((DATA / "goldens.json").read_text())["cases"]["tiny_vjepa2_ac"]["plan"]["cem"]

GOLDENS = {
    name.removeprefix(_PREFIX): tensor
    for name, tensor in load_file(DATA / "goldens.safetensors").items()
    if name.startswith(_PREFIX)
}
ARRAYS = {name: tensor.numpy() for name, tensor in GOLDENS.items()}
REPS = GOLDENS["reps"].unflatten(1, (6, 16))  # [1, frames, patches, width]
SEARCHES = {}
for _name, _facts in _CEM.items():
    SEARCHES[_name] = {**_facts, "noise": ARRAYS[f"cem_{_name}/noise"]}
    for _ours, _theirs in (("horizon", "rollout"), ("iterations", "cem_steps")):
        SEARCHES[_name][_ours] = SEARCHES[_name].pop(_theirs)


def networks(dtype: torch.dtype = torch.float32) -> AcNetworks:
    return load_ac_networks(TINY, device="cpu", dtype=dtype)


def frames(count: int, **more) -> Frames:
    """The first frames of the goldens' clip, with what was done and where the arm was."""
    poses, moves = GOLDENS["poses"], GOLDENS["pose_diffs"]
    return Frames(REPS[:, :count], moves[:, :count], poses[:, :count], **more)


def close(found, name: str, near: float = 2e-5) -> None:
    """Compare with the golden of that name, absolutely."""
    found, golden = np.asarray(found), ARRAYS[name]
    assert found.shape == golden.shape, name
    assert np.abs(found.astype(np.float64) - golden).max() <= near, name
