from __future__ import annotations

import numpy as np
import pytest
import torch

from mstar.engine.kernels.counter_noise import exponential, key, mix, uniform, uniform_batch

COUNT = 4000


def numbers(seed, counter, count=COUNT, ids=None):
    ids = np.arange(count) if ids is None else ids
    return uniform(key(seed, counter), ids, np.empty(len(ids)), np.empty(len(ids), np.uint64))


def test_mix_is_the_finaliser_of_splitmix64():
    """The first outputs of the published generator for the seed 1234567."""
    gamma = 0x9E3779B97F4A7C15
    found = [mix(1234567 + gamma * n) for n in (1, 2, 3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1])
def test_numpy_and_torch_agree_to_the_bit(seed):
    keys = [key(seed, n) for n in range(5)]
    columns = torch.tensor([(k ^ 1 << 63) - (1 << 63) for k in keys]).unsqueeze(1)
    ids = np.random.default_rng(0).permutation(200_000)[:COUNT]
    found = uniform_batch(columns, torch.from_numpy(ids)).numpy()
    for n in range(5):
        np.testing.assert_array_equal(found[n], numbers(seed, n, ids=ids))
    assert numbers(seed, 0).tolist() == numbers(seed + 2**64, 0).tolist()


def test_a_number_belongs_to_its_token_wherever_that_stands():
    some = np.array([3999, 17, 0, 256])
    np.testing.assert_array_equal(numbers(1, 2, ids=some), numbers(1, 2)[some])


def test_numbers_are_even_between_zero_and_one():
    """Chi-square with 63 degrees of freedom: above 103.4 one time in a thousand."""
    draws = np.concatenate([numbers(seed, n) for seed in range(10) for n in range(10)])
    assert 0 < draws.min() < draws.max() < 1
    assert len(np.unique(draws)) == len(draws)
    counts = np.histogram(draws, 64, (0, 1))[0]
    expected = len(draws) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 103.4
    times = exponential(draws)
    assert (times > draws).all()
    assert times.mean() == pytest.approx(1, abs=0.01)
    assert times.var() == pytest.approx(1, abs=0.02)


def test_tokens_draws_and_seeds_are_independent():
    """Correlations of independent numbers are normal with deviation 1 / sqrt(n)."""
    table = np.stack([[numbers(seed, n) for n in range(12)] for seed in (0, 1, 2, 3, 2**40)])
    flat = table.reshape(-1, COUNT)
    pairs = np.corrcoef(flat)[np.triu_indices(len(flat), 1)]  # other draws, other seeds
    assert abs(pairs).max() < 5 / np.sqrt(COUNT)
    assert pairs.std() == pytest.approx(1 / np.sqrt(COUNT), rel=0.1)
    for lag in (1, 2, 3, 4, 8, 64, 128, 1024):  # other tokens
        one, other = flat[:, lag:].ravel(), flat[:, :-lag].ravel()
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(one.size)
    for bit in range(12):  # each bit of a token id is as good as any other
        mask = np.arange(COUNT) >> bit & 1 == 1
        assert abs(flat[:, mask].mean() - flat[:, ~mask].mean()) < 4.5 * np.sqrt(1 / 3 / flat.size)
