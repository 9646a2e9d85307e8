"""V-JEPA 2 on a GPU: captured or not, the numbers are those of the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mstar import Engine
from mstar.engine.captured import CapturedSteps

pytestmark = pytest.mark.gpu

GOLDENS = load_file(Path(__file__).parents[2] / "data/vjepa2/goldens.safetensors")
CLIP = {"video": GOLDENS["tiny_vjepa2/frames_u8"].numpy(), "num_frames": 8}
FLOWS = {
    "encoder_out": {"skip_predictor": True},
    "predictor_full": {},
    "anticipation_rollout": {"rollout_horizon": 3},
}


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 2e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("captured", [True, False])
def test_flows(dtype, apart, captured):
    with Engine("vjepa2-tiny", device="cuda", dtype=dtype) as engine:
        if not captured:
            engine.model._steps = CapturedSteps(None, engine.device)
        for name, flow in FLOWS.items():
            expected = GOLDENS[f"tiny_vjepa2/{name}"].numpy()
            for _ in range(2):  # the second time, what was captured is replayed
                latents = engine.generate(**CLIP, **flow).latents
                found = latents[0] if len(latents) == 1 else np.stack(latents, 1)
                assert abs(found - expected).max() < apart
                pair = torch.from_numpy(found), torch.from_numpy(expected)
                assert torch.cosine_similarity(*pair, dim=-1).min() > 0.999


def test_clips_share_a_batch():
    clips = [{**CLIP, "video": np.roll(CLIP["video"], shift, axis=2)} for shift in range(3)]
    with Engine("vjepa2-tiny", device="cuda", dtype="float32") as engine:
        alone = [engine.generate(**clip).latents[0] for clip in clips]
        together = [result.latents[0] for result in engine.generate_batch(clips)]
    for mine, theirs in zip(alone, together, strict=True):
        assert abs(mine - theirs).max() < 2e-3
