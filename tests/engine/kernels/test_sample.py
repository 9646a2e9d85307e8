from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mstar.engine.kernels import sample
from mstar.engine.kernels.sample import bias, penalise, sample_batch, sample_row
from mstar.engine.kernels.sample_rows import SampleRows
from mstar.engine.sampler import DeviceSampler, HostSampler
from mstar.engine.sampling import HostState, SamplingParams

GOLDENS = Path(__file__).parents[2] / "data" / "orpheus" / "goldens.safetensors"


CPU = torch.device("cpu")


def chances(logits, params, history=()):
    """The probability of each token that can come out."""
    row, state = np.array(logits, dtype=np.float32), HostState(params, history, len(logits))
    sample._penalise_row(row, state)
    ids, weights = sample._survivors(row, float(row.max()), params)
    ids, weights = ids[weights > 0].tolist(), weights[weights > 0]
    return dict(zip(ids, (weights / weights.sum()).tolist(), strict=True))


def kept(logits, params, history=()):
    """The tokens that can come out."""
    return set(chances(logits, params, history))


def batched(logits, states):
    rows = torch.from_numpy(np.array(logits, dtype=np.float32))
    return sample_batch(rows, SampleRows(states, rows.shape[1], CPU)).tolist()


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
    assert batched(logits[None], [HostState(params, [], 4)]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[1, np.nan, 0], [-np.inf] * 3, [0, np.inf, 0], [np.nan] * 3])
def test_no_token_is_chosen_from_scores_that_make_no_sense(bad, temperature):
    params = SamplingParams(temperature=temperature, top_p=0.9)
    bad, good = np.array(bad, dtype=np.float32), np.array([-np.inf, 5, -np.inf], dtype=np.float32)
    assert sample_row(bad.copy(), HostState(params, [], 3)) == -1
    states = [HostState(params, [], 3) for _ in range(2)]
    assert batched(np.stack([bad, good]), states) == [-1, 1]


@pytest.mark.parametrize("vocab", [3, 6000])
def test_tokens_that_are_equally_likely_are_drawn_evenly_and_cut_from_the_end(vocab):
    flat = np.zeros(vocab)
    assert kept(flat, SamplingParams()) == set(range(vocab))
    assert kept(flat, SamplingParams(top_k=2)) == {0, 1}
    assert kept(flat, SamplingParams(top_p=0.5)) == set(range((vocab + 1) // 2))
    assert kept(flat, SamplingParams(min_p=1.0)) == set(range(vocab))


def test_stop_tokens_wait_for_min_tokens_and_biases_are_added():
    params = SamplingParams(temperature=0.0, stop_ids=frozenset([1, 99, -1]), min_tokens=1)
    state = HostState(params, [], 3)
    logits = np.array([0, 9, 1], dtype=np.float32)
    assert sample_row(logits.copy(), state) == 2
    state.push(2)
    assert sample_row(logits.copy(), state) == 1
    biased = HostState(SamplingParams(temperature=0.0, logit_bias={0: 10.0, 7: 1e9}), [], 3)
    assert sample_row(logits.copy(), biased) == 0


def drawn(sampler, logits, seeds, steps, **options):
    """How often each token is drawn, by several sequences for some steps."""
    states = [sampler.open(SamplingParams(seed=s, **options), []) for s in seeds]
    rows = torch.from_numpy(logits).repeat(len(states), 1)
    tokens = torch.stack([sampler.sample(rows.clone(), states) for _ in range(steps)])
    return np.bincount(tokens.flatten().numpy(), minlength=len(logits)), tokens


@pytest.mark.parametrize("make", [HostSampler, lambda vocab: DeviceSampler(vocab, "cpu")])
def test_draws_follow_the_distribution(make):
    """Chi-square with 7 degrees of freedom: above 24.3 one time in a thousand."""
    logits = np.log([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02]).astype(np.float32)
    counts, tokens = drawn(make(8), logits, range(7, 107), 200)
    expected = np.exp(logits) * tokens.numel()
    assert ((counts - expected) ** 2 / expected).sum() < 24.3
    # Tokens of one step, and of one sequence, say nothing about their neighbours (49 degrees).
    for one, other in ((tokens[1:], tokens[:-1]), (tokens[:, 1:], tokens[:, :-1])):
        pairs = np.bincount((one * 8 + other).flatten().numpy(), minlength=64).reshape(8, 8)
        expected = np.outer(pairs.sum(1), pairs.sum(0)) / pairs.sum()
        assert ((pairs - expected) ** 2 / expected).sum() < 85.4


def test_draws_from_a_large_vocabulary_follow_the_distribution():
    """Where not every logarithm is taken. 31 degrees of freedom: above 61.1 once in a thousand."""
    vocab = 8000
    logits = np.random.default_rng(0).normal(0, 1, vocab).astype(np.float32)
    counts, _ = drawn(HostSampler(vocab), logits, range(80), 50)
    share = np.exp(logits.astype(np.float64))
    expected = (share / share.sum()).reshape(32, -1).sum(1) * 4000
    found = counts.reshape(32, -1).sum(1)
    assert ((found - expected) ** 2 / expected).sum() < 61.1


def test_the_shortcut_of_the_race_finds_its_winner():
    rng = np.random.default_rng(0)
    for trial in range(60):
        count = int(rng.integers(sample._SORTABLE + 1, 30_000))
        ids = np.sort(rng.permutation(160_000)[:count])
        weights = np.exp(rng.normal(0, rng.choice([0.0, 0.5, 5.0]), count))
        if trial % 2:
            weights[rng.random(count) < 0.99] = 0.0
        times = sample.exponential(sample.uniform(trial, ids, *sample._scratch.race(count)))
        expected = ids[(weights / times).argmax()]
        assert sample._race(ids, weights.copy(), trial) == expected


def inversion_changes(one, other):
    """The chance that a uniform number falls on another token: where the usual draw differs."""
    sums = [np.cumsum(np.exp(row.astype(np.float64))) for row in (one, other)]
    first, second = (np.concatenate([[0.0], s / s[-1]]) for s in sums)
    same = np.minimum(first[1:], second[1:]) - np.maximum(first[:-1], second[:-1])
    return 1 - np.maximum(same, 0).sum()


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_a_slight_change_of_the_logits_hardly_ever_changes_a_token(top_p):
    vocab, seeds = 150_000, range(80)
    rng = np.random.default_rng(0)
    sampler = HostSampler(vocab)
    changed, inversion = 0, []
    for _ in range(5):
        logits = rng.normal(0, 1, vocab).astype(np.float32)
        noisy = logits * (1 + 3e-5 * rng.standard_normal(vocab).astype(np.float32))
        inversion.append(inversion_changes(logits, noisy))
        one, other = (
            drawn(sampler, row, seeds, 1, top_p=top_p)[1].numpy() for row in (logits, noisy)
        )
        changed += int((one != other).sum())
    assert changed < 0.005 * len(seeds) * 5
    assert np.mean(inversion) > 0.005


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
    rows = SampleRows([state], vocab, CPU)
    penalised = penalise(golden["in"], prompt, torch.zeros(1, vocab), rows)
    torch.testing.assert_close(penalised, golden["after_penalty"])
    torch.testing.assert_close(bias(penalised, [state]) / 0.6, golden["after_temperature"])
    expected = set(torch.isfinite(golden["after_top_p"][0]).nonzero().flatten().tolist())
    found = chances(golden["in"][0].numpy(), params, golden["history"][0].tolist())
    assert set(found) == expected
    probabilities = np.zeros(vocab)
    probabilities[list(found)] = list(found.values())
    np.testing.assert_allclose(probabilities, golden["probs"][0].numpy(), atol=1e-6)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.95, 0.999, 0.9999999])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
@pytest.mark.parametrize(("spread", "top_k"), [(0.3, 0), (2.0, 0), (6.0, 0), (2.0, 50), (30.0, 7)])
def test_the_short_cut_finds_the_same_tokens(monkeypatch, top_p, min_p, spread, top_k):
    params = SamplingParams(temperature=0.7, top_p=top_p, min_p=min_p, top_k=top_k)
    chance = np.random.default_rng(0)
    found = 0
    for _ in range(20):
        logits = (chance.standard_normal(20_000) * spread).astype(np.float32)
        peaks = chance.integers(0, 20_000, 6)
        logits[peaks] = chance.choice([9.0, 12.0, 20.0, 20.0], 6)  # with ties
        logits[peaks[0]] = 20.0
        top = float(logits.max())
        short = sample._few(logits, top, params)
        with monkeypatch.context() as patch:
            patch.setattr(sample, "_few", lambda *_: None)
            ids, weights = sample._survivors(logits, top, params)
        ids, weights = ids[weights > 0], weights[weights > 0]
        if short is not None:
            found += 1
            order = short[0].argsort()
            assert short[0][order].tolist() == ids.tolist()
            np.testing.assert_array_equal(short[1][order], weights)
    if top_k or (spread == 0.3 and top_p < 0.99):
        assert found == 20
