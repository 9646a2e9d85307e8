from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mstar.engine.kernels.sample import bias, penalise, sample_batch, sample_row
from mstar.engine.sampler import DeviceSampler, HostSampler
from mstar.engine.sampling import HostState, SamplingParams

GOLDENS = Path(__file__).parents[2] / "data" / "orpheus" / "goldens.safetensors"


def kept(logits, params, history=(), draws=4000):
    """The tokens that can come out, by drawing evenly spaced numbers instead of random ones."""
    state = HostState(params, history, len(logits))
    tokens = set()
    for i in range(draws):
        state.next_uniform = lambda i=i: (i + 0.5) / draws
        tokens.add(sample_row(np.array(logits, dtype=np.float32), state))
    return tokens


@st.composite
def rows(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocab = draw(st.sampled_from([1, 2, 7, 64, 1000, 5000, 20000]))
    scale = draw(st.sampled_from([0.0, 0.01, 0.6, 3.0, 20.0]))
    logits = rng.standard_normal(vocab) * scale + draw(st.sampled_from([0.0, -50.0, 300.0]))
    if draw(st.booleans()):  # ties
        logits = np.round(logits)
    if draw(st.booleans()):  # banned tokens
        logits[rng.random(vocab) < 0.3] = -np.inf
        logits[rng.integers(vocab)] = 0.0
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-12, 0.1, 0.6, 1.0, 5.0, 1e6])),
        top_k=draw(st.sampled_from([0, 1, 5, 50, 10**6])),
        top_p=draw(st.sampled_from([1.0, 0.999, 0.8, 0.3, 0.0])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.3])),
        logit_bias={0: 1.5, 6: -100.0},
        min_tokens=draw(st.sampled_from([0, 3])),
        stop_ids=frozenset(range(5, 12)),
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    return logits.astype(np.float32), params, rng.integers(vocab, size=5).tolist()


@given(rows())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_a_row_and_a_batch_choose_the_same_tokens(case):
    logits, params, prompt = case
    host, device = HostSampler(len(logits)), DeviceSampler(len(logits), "cpu")
    states = host.open(params, prompt), device.open(params, prompt)
    for _ in range(6):
        row = torch.from_numpy(logits.copy())[None]
        dense = device.sample(row.clone(), [states[1]]).tolist()
        assert host.sample(row.clone(), [states[0]]).tolist() == dense


def test_greedy_takes_the_first_of_the_best():
    params = SamplingParams(temperature=0.0)
    logits = np.array([0, 3, 1, 3], dtype=np.float32)
    assert sample_row(logits.copy(), HostState(params, [], 4)) == 1
    assert sample_batch(torch.from_numpy(logits)[None], [HostState(params, [], 4)]).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[1, np.nan, 0], [-np.inf] * 3, [0, np.inf, 0], [np.nan] * 3])
def test_no_token_is_chosen_from_scores_that_make_no_sense(bad, temperature):
    params = SamplingParams(temperature=temperature, top_p=0.9)
    bad, good = np.array(bad, dtype=np.float32), np.array([-np.inf, 5, -np.inf], dtype=np.float32)
    assert sample_row(bad.copy(), HostState(params, [], 3)) == -1
    states = [HostState(params, [], 3) for _ in range(2)]
    assert sample_batch(torch.from_numpy(np.stack([bad, good])), states).tolist() == [-1, 1]


@pytest.mark.parametrize("vocab", [3, 6000])
def test_tokens_that_are_equally_likely_are_drawn_evenly_and_cut_from_the_end(vocab):
    flat = np.zeros(vocab)
    assert kept(flat, SamplingParams(), draws=vocab) == set(range(vocab))
    assert kept(flat, SamplingParams(top_k=2)) == {0, 1}
    assert kept(flat, SamplingParams(top_p=0.5), draws=vocab) == set(range((vocab + 1) // 2))
    assert kept(flat, SamplingParams(min_p=1.0), draws=vocab) == set(range(vocab))


def test_stop_tokens_wait_for_min_tokens_and_biases_are_added():
    params = SamplingParams(temperature=0.0, stop_ids=frozenset([1, 99, -1]), min_tokens=1)
    state = HostState(params, [], 3)
    logits = np.array([0, 9, 1], dtype=np.float32)
    assert sample_row(logits.copy(), state) == 2
    state.push(2)
    assert sample_row(logits.copy(), state) == 1
    biased = HostState(SamplingParams(temperature=0.0, logit_bias={0: 10.0, 7: 1e9}), [], 3)
    assert sample_row(logits.copy(), biased) == 0


def test_draws_follow_the_distribution():
    """Chi-square with 7 degrees of freedom: above 24.3 one time in a thousand."""
    logits = np.log([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02]).astype(np.float32)
    draws = 20000
    for sampler in HostSampler(8), DeviceSampler(8, "cpu"):
        state = sampler.open(SamplingParams(seed=7), [])
        counts = np.zeros(8)
        for _ in range(draws // 100):
            rows = torch.from_numpy(logits).repeat(100, 1)
            states = [sampler.open(SamplingParams(seed=s), []) for s in range(100)]
            for s in states:
                s.drawn = state.drawn
            np.add.at(counts, sampler.sample(rows, states).numpy(), 1)
            state.drawn += 1
        expected = np.exp(logits) * draws
        assert ((counts - expected) ** 2 / expected).sum() < 24.3


# -- against transformers ------------------------------------------------------------------------


def processed(logits, history, **options):
    """The tokens that transformers' processors leave."""
    from transformers.generation import logits_process as hf

    row, ids = torch.tensor(logits)[None], torch.tensor([history])
    for name, cls in (
        ("repetition_penalty", hf.RepetitionPenaltyLogitsProcessor),
        ("temperature", hf.TemperatureLogitsWarper),
        ("top_k", hf.TopKLogitsWarper),
        ("top_p", hf.TopPLogitsWarper),
        ("min_p", hf.MinPLogitsWarper),
    ):
        if name in options:
            row = cls(options[name])(ids, row)
    return set(torch.isfinite(row[0]).nonzero().flatten().tolist()), row.softmax(-1)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 0.6, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
    ],
)
def test_the_kept_tokens_are_those_of_transformers(options):
    rng = np.random.default_rng(3)
    for _ in range(5):
        logits = (rng.standard_normal(40) * 2).astype(np.float32)
        history = rng.integers(40, size=6).tolist()
        expected, probabilities = processed(logits, history, **options)
        likely = {t for t in expected if probabilities[t] > 1e-3}
        found = kept(logits, SamplingParams(**options), history)
        assert likely <= found <= expected


def test_the_steps_match_the_reference_notes():
    golden = {k.removeprefix("sampler."): v for k, v in load_file(GOLDENS).items()}
    params = SamplingParams(temperature=0.6, top_p=0.8, repetition_penalty=1.3)
    vocab = golden["in"].shape[1]
    state = DeviceSampler(vocab, "cpu").open(params, golden["history"][0].tolist())
    prompt = torch.zeros(1, vocab, dtype=torch.bool)
    prompt[0, golden["history"][0].long()] = True
    penalised = penalise(golden["in"], prompt, torch.zeros(1, vocab), [state])
    torch.testing.assert_close(penalised, golden["after_penalty"])
    torch.testing.assert_close(bias(penalised, [state]) / 0.6, golden["after_temperature"])
    expected = set(torch.isfinite(golden["after_top_p"][0]).nonzero().flatten().tolist())
    history = golden["history"][0].tolist()
    assert kept(golden["in"][0].numpy(), params, history) == expected
    counts = np.zeros(vocab)
    host = HostState(params, history, vocab)
    for i in range(4000):
        host.next_uniform = lambda i=i: (i + 0.5) / 4000
        counts[sample_row(golden["in"][0].numpy().copy(), host)] += 1
    np.testing.assert_allclose(counts / 4000, golden["probs"][0].numpy(), atol=5e-4)
