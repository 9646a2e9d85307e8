"""The kernels that sample on a GPU choose the tokens that are chosen on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from mstar.engine import sampler
from mstar.engine.kernels import sample, sample_cut, sample_fused
from mstar.engine.kernels.counter_noise import key, remainders, uniform_batch
from mstar.engine.kernels.dispatch import jit, tl
from mstar.engine.kernels.sample import bias, sample_torch
from mstar.engine.kernels.sample_fused import sample_triton
from mstar.engine.kernels.sample_rows import (
    HeldRows,
    SampleRows,
    draw_numbers,
    thresholds_of,
)
from mstar.engine.sampler import DeviceSampler, HostSampler
from mstar.engine.sampling import DeviceState, HostState, SamplingParams

VOCAB = 301


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in a row, and several tokens in a bin."""
    monkeypatch.setattr(sample_fused, "_BLOCK", 128)
    monkeypatch.setattr(sample_cut, "_BINS", 64)
    monkeypatch.setattr(sample_cut, "_SPAN", 2)
    monkeypatch.setattr(sample_cut, "_SCAN", 128)


@pytest.fixture(params=[300, 3], ids=["listed", "crowded"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for all tokens near a cut, or not even for a few."""
    monkeypatch.setattr(sample_cut, "_ROOM", request.param)


def some_logits(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """Flat, peaked, far from zero, with ties, with banned tokens."""
    logits = rng.standard_normal(vocab) * rng.choice([0.01, 0.6, 3.0, 20.0])
    logits += rng.choice([0.0, -50.0, 300.0])
    if rng.random() < 0.5:
        logits = np.round(logits)
    if rng.random() < 0.3:
        logits[rng.random(vocab) < 0.3] = -np.inf
        logits[rng.integers(vocab)] = 0.0
    return logits.astype(np.float32)


def rows_of(params: list[SamplingParams], vocab: int, device: str) -> SampleRows:
    return SampleRows([HostState(p, [], vocab) for p in params], vocab, torch.device(device))


def reference(logits: np.ndarray, params: list[SamplingParams]) -> list[int]:
    """Row by row, as on the CPU."""
    states = [HostState(p, [], logits.shape[1]) for p in params]
    return [sample.sample_row(row.copy(), s) for row, s in zip(logits, states, strict=True)]


def cases(seed: int, count: int) -> list[SamplingParams]:
    """Top-k, top-p, min-p and the temperature in all combinations, 36."""
    rng = np.random.default_rng(seed)
    combined = product([0.3, 3.0], [0, 1, 40], [1.0, 0.9, 0.4], [0.0, 0.2])
    names = "temperature", "top_k", "top_p", "min_p", "seed"
    every = [
        SamplingParams(**dict(zip(names, (*values, int(rng.integers(2**62))), strict=True)))
        for values in combined
    ]
    return [every[i] for i in rng.permutation(len(every))[:count]]


@pytest.mark.parametrize(("vocab", "some"), [(1, (0, 3)), (128, (0, 24)), (VOCAB, (24, 36))])
def test_every_combination_of_parameters_chooses_the_same_tokens(
    vocab: int, some: tuple[int, int], triton_device: str
) -> None:
    rng = np.random.default_rng(vocab)
    params = cases(0, 36)[slice(*some)]
    params[2:2] = SamplingParams(temperature=0.0), SamplingParams(min_p=1.0)
    logits = np.stack([some_logits(rng, vocab) for _ in params])
    found = sample_triton(
        torch.from_numpy(logits).to(triton_device), rows_of(params, vocab, triton_device)
    )
    assert found.tolist() == reference(logits, params)


def kept(logits: np.ndarray, params: list[SamplingParams], device: str) -> list[set[int]]:
    """The tokens of each row that its cut keeps."""
    rows = rows_of(params, logits.shape[1], device)
    x = torch.from_numpy(logits).to(device)
    blocks = x.split(sample_fused._BLOCK, 1)
    low = [b.masked_fill(b == -torch.inf, torch.inf).amin(1) for b in blocks]
    extents = torch.stack([torch.stack([b.amax(1) for b in blocks], 1), torch.stack(low, 1)], 1)
    temperature, top_p, _ = rows.thresholds
    columns = temperature, top_p, rows.top_k
    cuts = sample_cut.cuts_triton(x, extents, columns, sample_fused._BLOCK).tolist()
    bits = (logits + np.float32(0)).view(np.int32)
    order = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64) << 32
    order |= 0x7FFFFFFF - np.arange(logits.shape[1])
    return [set(np.flatnonzero(row >= cut).tolist()) for row, cut in zip(order, cuts, strict=True)]


@pytest.mark.usefixtures("room")
def test_the_kept_tokens_are_those_of_the_cpu(triton_device: str) -> None:
    rng = np.random.default_rng(7)
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature, top_k, top_p in (
            *((0.5, 7, 1.0), (0.5, 0, 0.8), (0.5, 300, 0.9)),
            *((2.0, 60, 0.0), (2.0, 60, 0.2), (2.0, 0, 0.9)),
        )
    ]
    logits = np.stack([some_logits(rng, VOCAB) for _ in params])
    for row, found, p in zip(logits, kept(logits, params, triton_device), params, strict=True):
        ids, weights = sample._survivors(row, float(row.max()), p)
        expected = set(ids[weights > 0].tolist())
        likely = set(np.flatnonzero(row > row.max() - 39 * p.temperature).tolist())
        assert found & likely == expected & likely


def test_of_equal_tokens_those_with_lower_ids_are_kept(triton_device: str) -> None:
    flat = np.zeros((3, 300), dtype=np.float32)
    flat[:, ::2] = -0.0
    options = {"top_k": 2}, {"top_p": 0.5}, {"top_k": 100, "top_p": 0.5}
    found = kept(flat, [SamplingParams(**o) for o in options], triton_device)
    assert found == [set(range(2)), set(range(150)), set(range(50))]


def test_tokens_between_the_two_cuts_are_left_out(triton_device: str) -> None:
    """Those of the first are near the top, those of the second at the bottom; the rest neither."""
    logits = np.array([[0.02, 0.005, 0.0, 0.01, 0.002, -np.inf, -np.inf]], dtype=np.float32)
    assert kept(logits, [SamplingParams(top_k=5, top_p=0.0)], triton_device) == [{0}]
    assert kept(logits, [SamplingParams(top_k=5, top_p=0.5)], triton_device) == [{0, 1, 3}]


KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1, min_tokens=2, stop_ids=frozenset([3, 7, 200])),
    SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3, seed=2),
    SamplingParams(top_k=20, frequency_penalty=0.5, presence_penalty=0.2, seed=3),
    SamplingParams(min_p=0.1, logit_bias={5: 4.0}, repetition_penalty=0.8, seed=4),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=-0.3),
    SamplingParams(temperature=0.0, presence_penalty=9.0),
    SamplingParams(temperature=0.0, frequency_penalty=9.0),
    SamplingParams(temperature=1e-320, top_p=0.5),
    SamplingParams(temperature=1e300, top_p=0.5, presence_penalty=1e300),
]


def drawn(device: DeviceSampler, logits: torch.Tensor, states: list[DeviceState]) -> torch.Tensor:
    """As `DeviceSampler.sample`, but of columns of a table, as in a captured step."""
    numbers = [draw_numbers(state, VOCAB) for state in states]
    ints = torch.tensor(numbers, device=logits.device).T.contiguous()
    numbers = [thresholds_of(state) for state in states]
    floats = torch.tensor(numbers, dtype=torch.float64, device=logits.device).T.contiguous()
    rows = HeldRows(VOCAB, floats.unbind(), ints.unbind())
    tokens = device.draw(logits, rows, partial(bias, states=states))
    for state in states:
        state.drawn += 1
    return tokens


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("way", [DeviceSampler.sample, drawn])
def test_penalties_biases_and_stop_tokens_are_those_of_the_host(
    way: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch, triton_device: str
) -> None:
    monkeypatch.setattr(sampler, "use_triton", lambda _: True)
    host, device = HostSampler(VOCAB), DeviceSampler(VOCAB, triton_device)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(VOCAB, size=9).tolist() for _ in KINDS]
    prompts[0] = prompts[1]
    states = [
        [s.open(params, prompt) for params, prompt in zip(KINDS, prompts, strict=True)]
        for s in (host, device)
    ]
    logits = torch.from_numpy(rng.normal(0, 3, (len(KINDS), VOCAB)).astype(np.float32))
    for _ in range(2):  # of the same logits, so that tokens repeat
        expected = host.sample(logits.clone(), states[0]).tolist()
        found = way(device, logits.to(triton_device).clone(), states[1])
        assert found.tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_chosen_from_scores_that_make_no_sense(
    temperature: float, triton_device: str
) -> None:
    logits = torch.zeros(5, VOCAB)
    logits[0, 200] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3] = torch.nan
    logits[4, [9, 250]] = 99.0
    params = [SamplingParams(temperature=temperature, top_p=0.4)] * 5
    rows = rows_of(params, VOCAB, triton_device)
    found = sample_triton(logits.to(triton_device), rows).tolist()
    assert found == [-1, -1, -1, -1, 9]


def test_a_warm_sampler_has_run_every_kernel_and_keeps_no_slot(
    monkeypatch: pytest.MonkeyPatch, triton_device: str
) -> None:
    monkeypatch.setattr(sampler, "use_triton", lambda _: True)
    device = DeviceSampler(8, triton_device)
    ran = set()

    def run(logits: torch.Tensor, rows: SampleRows, tables: object, adjust: object):
        ran.add((rows.are_greedy, rows.cut_by_rank, tables is not None))
        return sample_triton(logits, rows, tables, adjust)

    monkeypatch.setattr(sampler, "sample_triton", run)
    device.warmup()
    kinds = (True, False), (False, False), (False, True)
    assert ran == {(*kind, penalised) for kind in kinds for penalised in (False, True)}
    assert len(device._free) == len(device.tables[0]) - 1


def test_parameters_and_logits_may_be_parts_of_larger_tables(triton_device: str) -> None:
    params = [*cases(3, 3), SamplingParams(temperature=0.0)]
    rows = rows_of(params, VOCAB, triton_device)
    floats = torch.cat(rows.thresholds, 1)
    numbers = torch.cat([rows.top_k, rows.keys, rows.top_k], 1)
    columns = HeldRows(VOCAB, floats.unbind(1), (numbers[:, 1], numbers[:, 0]))
    logits = np.stack([some_logits(np.random.default_rng(i), VOCAB) for i in range(4)])
    wide = torch.zeros(4, VOCAB + 30, device=triton_device)
    wide[:, :VOCAB] = torch.from_numpy(logits)
    assert sample_triton(wide[:, :VOCAB], columns).tolist() == reference(logits, params)
    assert sample_triton(wide[:0, :VOCAB], columns).tolist() == []


@jit
def _write_remainders(keys, out, SIZE: tl.constexpr):
    id = tl.arange(0, SIZE)
    key = tl.load(keys).to(tl.uint64, bitcast=True)
    tl.store(out + id, remainders(key, id * 611))


def test_the_noise_is_the_same_to_the_bit(triton_device: str) -> None:
    for seed in (0, 2**64 - 1):
        number = key(seed, 5)
        keys = torch.tensor([[(number ^ 1 << 63) - (1 << 63)]], device=triton_device)
        out = torch.empty(256, dtype=torch.float64, device=triton_device)
        _write_remainders[(1,)](keys, out, SIZE=256)
        ids = torch.arange(256, device=triton_device) * 611
        assert torch.equal(1 - uniform_batch(keys, ids)[0], out)


@pytest.mark.gpu
def test_a_large_vocabulary_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph, without the host ever waiting."""
    monkeypatch.undo()
    params = [*cases(0, 36), *cases(1, 28)]
    rows = rows_of(params, 156_940, "cuda")
    logits = torch.randn(64, 156_940, generator=torch.Generator().manual_seed(0)).cuda() * 3
    numbers = rows.keys.squeeze(1), rows.top_k.squeeze(1)
    columns = HeldRows(156_940, [column.squeeze(1) for column in rows.thresholds], numbers)
    expected = sample_torch(logits, rows)
    sample_triton(logits, columns)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sample_triton(logits, columns)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
