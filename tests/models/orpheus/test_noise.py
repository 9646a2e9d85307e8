"""The codec's noise depends on the seed and the frame, and on nothing else."""

import pytest
import torch

from mstar.models.orpheus.noise import frame_noise, window_noise

LENGTHS = [32, 256, 1024, 2048]


def test_shapes():
    assert [n.shape for n in frame_noise(0, 0, LENGTHS)] == [(n,) for n in LENGTHS]
    assert [n.shape for n in window_noise(0, 2, 5, LENGTHS)] == [(1, 1, 3 * n) for n in LENGTHS]
    assert window_noise(0, 2, 5, []) == []


def test_windows_agree_where_they_overlap():
    one, two = window_noise(7, 0, 6, LENGTHS), window_noise(7, 3, 9, LENGTHS)
    for a, b, n in zip(one, two, LENGTHS, strict=True):
        assert torch.equal(a[..., 3 * n :], b[..., : 3 * n])


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    frame_noise(3, 4, LENGTHS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 - 1, 2**80 + 5])
def test_any_integer_is_a_seed(seed):
    assert torch.equal(frame_noise(seed, 3, LENGTHS)[0], frame_noise(seed, 3, LENGTHS)[0])


def test_seeds_and_frames_are_unrelated():
    draws = torch.stack(
        [torch.cat(frame_noise(seed, frame, LENGTHS)) for seed in range(4) for frame in range(4)]
    )
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.08  # 3360 draws: a standard error of 0.017
    assert abs(draws.mean()) < 0.02
    assert abs(draws.std() - 1) < 0.02
