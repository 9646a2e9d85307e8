from __future__ import annotations

import numpy as np
import pytest
import torch

from mstar.engine.sampler import DeviceSampler, HostSampler, sampler_for
from mstar.engine.sampling import SamplingParams

VOCAB = 300
EVERY_KIND = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3, seed=2),
    SamplingParams(top_k=20, frequency_penalty=0.5, presence_penalty=0.2, seed=3),
    SamplingParams(min_p=0.1, logit_bias={5: 4.0}, seed=4),
    SamplingParams(temperature=0.0, repetition_penalty=1.5),
]


def logits(step, row):
    return torch.from_numpy(np.random.default_rng((step, row)).normal(0, 3, VOCAB)).float()


def stream(sampler, params, row, steps=30):
    """The tokens of one sequence alone."""
    state = sampler.open(params, [1, 2, 2, row])
    tokens = [int(sampler.sample(logits(i, row)[None], [state])[0]) for i in range(steps)]
    sampler.close(state)
    return tokens


def test_the_same_tokens_on_the_host_and_with_dense_operations():
    host, device = HostSampler(VOCAB), DeviceSampler(VOCAB, "cpu")
    for row, params in enumerate(EVERY_KIND):
        assert stream(host, params, row) == stream(device, params, row)


@pytest.mark.parametrize("make", [HostSampler, lambda vocab: DeviceSampler(vocab, "cpu")])
def test_a_sequence_does_not_depend_on_what_else_is_in_the_batch(make):
    sampler = make(VOCAB)
    alone = [stream(sampler, params, row) for row, params in enumerate(EVERY_KIND)]
    states = {row: sampler.open(params, [1, 2, 2, row]) for row, params in enumerate(EVERY_KIND)}
    together = [[] for _ in EVERY_KIND]
    order = np.random.default_rng(0)
    while any(len(tokens) < 30 for tokens in together):
        rows = [row for row in order.permutation(len(states)) if len(together[row]) < 30]
        rows = rows[: order.integers(1, len(rows) + 1)]
        batch = torch.stack([logits(len(together[row]), row) for row in rows])
        for row, token in zip(rows, sampler.sample(batch, [states[r] for r in rows]), strict=True):
            together[row].append(int(token))
    assert together == alone


def test_a_seed_is_reproducible_and_another_one_differs():
    sampler = HostSampler(VOCAB)
    one, again, other = (stream(sampler, SamplingParams(seed=s), 0) for s in (5, 5, 6))
    assert one == again != other


EXTREMES = [
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 1e300},
    {"temperature": 1e-30},
    {"temperature": 1e-320, "top_p": 0.5},
    {"temperature": 1e300, "top_p": 0.5},
    {"presence_penalty": 1e300, "frequency_penalty": -1e300},
    {"logit_bias": {3: 1e300, 4: -1e300, 5: float("inf")}},
    {"min_p": 1e-300, "top_p": 1e-300},
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", EXTREMES)
def test_extreme_parameters_neither_warn_nor_fail(options):
    params = SamplingParams(**options)
    host = stream(HostSampler(VOCAB), params, 0)
    assert min(host) >= 0
    assert host == stream(DeviceSampler(VOCAB, "cpu"), params, 0)


def test_penalties_count_the_prompt_or_the_output_as_they_should():
    flat = torch.zeros(1, 4)
    for sampler in HostSampler(4), DeviceSampler(4, "cpu"):
        params = SamplingParams(temperature=0.0, presence_penalty=1.0)
        state = sampler.open(params, [0, 0, 0])
        tokens = [int(sampler.sample(flat.clone(), [state])[0]) for _ in range(4)]
        assert tokens == [0, 1, 2, 3]  # the prompt is not penalised
        params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
        state = sampler.open(params, [0, 0])
        tokens = [int(sampler.sample(flat.clone() + 1, [state])[0]) for _ in range(4)]
        assert tokens == [1, 2, 3, 0]  # the prompt is penalised, and nobody twice
        params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
        state = sampler.open(params, [])
        scores = torch.tensor([[2.5, 1.0, 0.0, 0.0]])
        tokens = [int(sampler.sample(scores.clone(), [state])[0]) for _ in range(5)]
        assert tokens == [0, 0, 1, 0, 1]


def test_a_slot_that_is_used_again_has_forgotten_its_last_sequence():
    sampler = DeviceSampler(VOCAB, "cpu")
    params = SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5)
    first = stream(sampler, params, 0)
    many = [sampler.open(params, range(VOCAB)) for _ in range(30)]
    for state in many:
        sampler.close(state)
        sampler.close(state)
    assert stream(sampler, params, 0) == first
    assert sorted(sampler._free) == list(range(1, len(sampler.tables[0])))


def test_a_prompt_that_is_refused_takes_no_slot():
    sampler = DeviceSampler(VOCAB, "cpu")
    for _ in range(20):
        with pytest.raises(IndexError):
            sampler.open(SamplingParams(repetition_penalty=1.1), [VOCAB])
    assert len(sampler.tables[0]) <= 9


def test_a_history_longer_than_expected_is_kept():
    sampler = HostSampler(8)
    state = sampler.open(SamplingParams(temperature=0.0, frequency_penalty=0.1), [1])
    for _ in range(300):
        sampler.sample(torch.zeros(1, 8), [state])
    assert len(state.output) == 300
    assert np.bincount(state.output, minlength=8).tolist() == [38] * 4 + [37] * 4


def test_a_cpu_samples_row_by_row():
    assert isinstance(sampler_for(torch.device("cpu"), 8), HostSampler)
