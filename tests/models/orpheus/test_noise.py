"""The codec's noise depends on the seed and the frame, and on nothing else."""

import pytest
import torch

from mstar.models.orpheus.noise import FrameNoise, by_block

LENGTHS = [32, 256, 1024, 2048]
STEPS = sum(LENGTHS)


def test_shapes():
    window = FrameNoise(STEPS).window(0, 2, 5)
    assert (window.shape, window.dtype) == ((3, STEPS), torch.float32)
    blocks = by_block(torch.stack([window, window]), LENGTHS)
    assert [n.shape for n in blocks] == [(2, 1, 3 * n) for n in LENGTHS]


def test_a_block_has_its_part_of_every_frame_one_after_another():
    frames = torch.arange(2 * STEPS).view(1, 2, STEPS)
    first, second, *_ = by_block(frames, LENGTHS)
    assert first[0, 0].tolist() == [*range(32), *range(STEPS, STEPS + 32)]
    assert second[0, 0].tolist() == [*range(32, 288), *range(STEPS + 32, STEPS + 288)]


def test_windows_agree_where_they_overlap():
    one, two = FrameNoise(STEPS).window(7, 0, 6), FrameNoise(STEPS).window(7, 3, 9)
    assert torch.equal(one[3:], two[:3])


def test_a_frame_is_the_same_when_it_is_asked_for_again():
    noise = FrameNoise(STEPS)
    first = noise.window(1, 0, 4).clone()
    noise.window(2, 0, 4)
    assert torch.equal(noise.window(1, 0, 4), first)


def test_the_noise_of_a_seed_stays_what_it_is():
    window = FrameNoise(STEPS).window(3, 1, 2)
    expected = torch.tensor([0.01663, -0.969877, -0.415937, -0.585884])
    torch.testing.assert_close(window[0, :4], expected, rtol=1e-5, atol=1e-6)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    FrameNoise(STEPS).window(3, 4, 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 - 1, 2**80 + 5])
def test_any_integer_is_a_seed(seed):
    assert torch.equal(FrameNoise(STEPS).window(seed, 3, 4), FrameNoise(STEPS).window(seed, 3, 4))


def test_seeds_and_frames_are_unrelated():
    noise = FrameNoise(STEPS)
    draws = torch.cat([noise.window(seed, 0, 4) for seed in range(4)])
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.08  # 3360 draws: a standard error of 0.017
    assert abs(draws.mean()) < 0.02
    assert abs(draws.std() - 1) < 0.02
