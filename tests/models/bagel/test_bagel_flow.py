"""The flow: timesteps, when it is guided, guidance, and steps that are guessed."""

from __future__ import annotations

import pytest
import torch
from bagel_loop import guided_velocity

from mstar.models.bagel.card import RENORM_TYPES
from mstar.models.bagel.guidance import Guidance
from mstar.models.bagel.schedule import flow_steps, timesteps
from mstar.models.bagel.taylorseer import TaylorSeer

# -- timesteps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "shift"), [(50, 3.0), (9, 3.0), (24, 1.0)])
def test_timesteps_are_those_of_the_reference(count, shift, goldens):
    goldens.check(f"schedule.n{count}_s{shift}", timesteps(count, shift))


def test_the_last_timestep_is_not_evaluated(goldens):
    grid = goldens["schedule.n9_s3.0"].tolist()
    steps = flow_steps(9, 3.0, (0.4, 1.0))
    assert [step.t for step in steps] == pytest.approx(grid[:-1], abs=1e-6)
    assert sum(step.dt for step in steps) == pytest.approx(1.0)
    assert [step.guided for step in steps] == [True] * 7 + [False]


def test_guidance_is_on_above_the_low_end_and_up_to_the_high_one():
    grid = timesteps(11, 1.0)
    low, high = grid[7].item(), grid[2].item()  # about 0.3 and 0.8
    assert [s.guided for s in flow_steps(11, 1.0, (low, high))] == [2 <= k < 7 for k in range(10)]
    assert not any(step.guided for step in flow_steps(11, 1.0, (0.5, 0.5)))
    assert all(step.guided for step in flow_steps(11, 1.0, (0.0, 1.0)))


def test_ends_of_the_interval_are_compared_in_float32():
    edge = flow_steps(11, 1.0, (0.8, 1.0))[2]
    assert 0.8 < edge.t < 0.8000001  # as Python numbers
    assert not edge.guided


# -- guidance ------------------------------------------------------------------------------------


def of_the_reference(goldens):
    return [
        Guidance(
            entry["cfg_text_scale"],
            entry["cfg_img_scale"],
            entry["cfg_renorm_type"],
            entry["cfg_renorm_min"],
        )
        for entry in goldens.facts["guidance"]
    ]


def test_guided_velocities_are_those_of_the_reference_one_by_one(goldens):
    three = [goldens[f"guidance.v{branch}"][None] for branch in "mti"]
    for index, guidance in enumerate(of_the_reference(goldens)):
        found = guided_velocity(*three, [guidance])
        goldens.check(f"guidance.{index}.v", found[0])


def test_guided_velocities_are_those_of_the_reference_all_at_once(goldens):
    every = of_the_reference(goldens)
    three = [goldens[f"guidance.v{branch}"].expand(len(every), -1, -1) for branch in "mti"]
    for index, found in enumerate(guided_velocity(*three, every)):
        goldens.check(f"guidance.{index}.v", found)


def test_a_request_is_guided_alike_whatever_goes_with_it():
    kinds = [Guidance(4.0, 2.0, renorm, 0.1) for renorm in RENORM_TYPES] + [Guidance()]
    main, text, image = torch.randn(3, 4, 48, 64)
    together = guided_velocity(main, text, image, kinds)
    for n, kind in enumerate(kinds):
        rows = slice(n, n + 1)
        alone = guided_velocity(main[rows], text[rows], image[rows], [kind])
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=1e-6)


def test_what_is_not_needed_may_be_anything():
    main, junk = torch.randn(2, 1, 6, 64)[:, None, 0]
    junk = junk * torch.nan
    off, by_text = Guidance(1.0, 3.0), Guidance(3.0, 1.0)
    assert (off.by_text, off.by_image, by_text.by_text, by_text.by_image) == (0, 0, 1, 0)
    assert torch.equal(guided_velocity(main, junk, junk, [off]), main)
    found = guided_velocity(main, main + 1, junk, [by_text])
    assert found.isfinite().all()


def test_without_renorm_the_formula_is_plain():
    main, text, image = torch.randn(3, 1, 6, 64)
    for renorm in RENORM_TYPES:
        guidance = [Guidance(4.0, 2.0, renorm, renorm_min=1.0)]
        plain = text + 4 * (main - text)
        plain = image + 2 * (plain - image)
        torch.testing.assert_close(guided_velocity(main, text, image, guidance), plain)


# -- steps that are guessed ----------------------------------------------------------------------


def test_the_network_runs_in_the_first_five_steps_and_then_in_every_third():
    seer, ran = TaylorSeer(), []
    for _ in range(15):
        ran.append(seer.is_due)
        seer.observe(torch.zeros(1)) if seer.is_due else seer.predict()
    assert ran == [True] * 5 + [False, False, True] * 3 + [False]


def test_a_straight_line_is_guessed_exactly_and_a_constant_at_once():
    seer = TaylorSeer()
    for step in range(20):
        value = torch.tensor([3.0 + 2.0 * step, 5.0])
        found = seer.observe(value) if seer.is_due else seer.predict()
        torch.testing.assert_close(found, value)
