"""Frames as one captured step: the codes that row by row sampling on the host draws."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.captured import CapturedSteps
from mstar.engine.sampling import SamplingParams
from mstar.engine.spans import Step, Tokens
from mstar.models.qwen3_omni.frames import FrameJob, Frames
from tests.recording import replays

PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, top_k=50, top_p=0.8, seed=1),
    SamplingParams(temperature=0.7, seed=2),
    SamplingParams(temperature=1.5, top_k=3, min_p=0.1, seed=3),
    SamplingParams(temperature=1.0, top_p=0.5, seed=4),
]


def step_of(code, hidden):
    return Step(Tokens(torch.tensor([code])), 0, hidden)


def completed(frames, params, rounds=3):
    """The codes and next inputs of some rounds of streams."""
    torch.manual_seed(0)
    states = [frames.open(each) for each in params]
    found = []
    for _ in range(rounds):
        jobs = [
            FrameJob(step_of(code, torch.randn(1, 48)), 300 + code, state)
            for code, state in enumerate(states)
        ]
        found += frames.run(jobs)
    return [frame.codes.tolist() for frame in found], torch.cat([f.inputs for f in found])


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_captured_step_draws_what_the_host_draws(loop, count):
    params = PARAMS[-count:]
    plain = completed(Frames(loop.omni, None, 6), params)
    steps = CapturedSteps(replays, torch.device("cpu"))
    captured = Frames(loop.omni, steps, 6)
    captured.warmup()
    assert len(steps) == 4  # of 1, 2, 4 and 6
    codes, inputs = completed(captured, params)
    assert len(steps) == 4
    assert codes == plain[0]
    torch.testing.assert_close(inputs, plain[1], atol=1e-4, rtol=0)


def test_scores_that_are_no_numbers_choose_some_code(loop):
    for steps in (None, CapturedSteps(replays, torch.device("cpu"))):
        frames = Frames(loop.omni, steps, 2)
        step = step_of(1, torch.full((1, 48), torch.nan))
        job = FrameJob(step, 300, frames.open(PARAMS[1]))
        (frame,) = frames.run([job])
        assert frame.codes.tolist()[0] == 1
        assert frame.codes.min() >= 0
