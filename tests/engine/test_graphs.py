"""The host's side of captured steps, with a recorder that runs the step instead of a GPU."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tiny_lm import GREEDY, NETWORK, alone, decode, language_model
from walks import results

from mstar.engine import lm as lm_module
from mstar.engine.graphs import DecodeGraphs
from mstar.engine.kernels.paged_batch import PagedBatch
from mstar.engine.paged_context import PagedContext
from mstar.engine.spans import Step, Tokens, gather_ids
from tests.recording import replays

pytestmark = pytest.mark.usefixtures("inference")
BUCKETS = [1, 2, 4, 8]


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


class Decode:
    """The step of a network over its fixed inputs; the CPU's kernels want lists."""

    def __init__(self, lm):
        self.lm = lm
        self.sizes = []

    def __call__(self, ids, positions, context):
        given, pool = context.batch, self.lm.pool
        count = int((context.slots >= 0).sum())
        assert torch.equal(context.slots[count:], torch.full_like(context.slots[count:], -1))
        assert given.kv_len[count:].tolist() == [1] * (len(ids) - count)
        self.sizes.append((len(ids), count))
        hidden = torch.zeros(len(ids), NETWORK.config.hidden_size)
        logits = torch.zeros(len(ids), NETWORK.vocab_size)
        if count:
            batch = PagedBatch(
                [1] * count,
                given.kv_len[:count].tolist(),
                given.block_table[:count].tolist(),
                [True] * count,
                given.page_size,
            )
            assert batch.slot_list == context.slots[:count].tolist()
            where = PagedContext(pool, batch, context.slots[:count])
            hidden[:count] = NETWORK(ids[:count], positions[:count], where)
            logits[:count] = NETWORK.logits(hidden[:count])
        return hidden, logits


def captured(**options):
    lm, runtime = language_model(**options)
    step = Decode(lm)
    lm.graphs = DecodeGraphs(step, lm.pool, BUCKETS, lm.pool.capacity, replays)
    lm.graphs.capture()
    return lm, runtime, step


@pytest.mark.parametrize("look_ahead", [False, True])
def test_captured_steps_choose_the_tokens_of_plain_ones(look_ahead):
    rng = random.Random(0)
    cases = [
        (
            rng.choices(range(40), k=rng.randint(1, 20)),
            replace(GREEDY, max_tokens=rng.randint(1, 20), temperature=float(n % 2), seed=n),
        )
        for n in range(11)
    ]
    lm, runtime, step = captured(max_batch=8, look_ahead=look_ahead)
    step.sizes.clear()
    found = results(*(decode(lm, p, s) for p, s in cases), runtime=runtime)
    assert found == [alone(p, s) for p, s in cases]
    assert {size for size, _ in step.sizes} == set(BUCKETS)
    assert all(size == min(b for b in BUCKETS if b >= count) for size, count in step.sizes)


def test_what_does_not_fit_is_not_captured():
    lm, _, _ = captured()
    assert lm.graphs.fits(8, [[0]] * 8)
    assert not lm.graphs.fits(9, [[0]] * 9)
    narrow = DecodeGraphs(lm.graphs.forward, lm.pool, BUCKETS, 8, replays)
    assert narrow.fits(1, [[0, 1]])
    assert not narrow.fits(1, [[0, 1, 2]])


def test_steps_may_have_inputs_and_outputs_of_their_own():
    lm, _ = language_model()

    def forward(ids, positions, context, pair):
        return ids + pair[0], pair[1].clone(), positions.clone()

    def more(size):
        return (torch.zeros(2, size, dtype=torch.int64),)

    graphs = DecodeGraphs(forward, lm.pool, [2, 4], 8, replays, more=more)
    for count in (1, 3, 2):
        rows = torch.arange(count)
        found = graphs.run(
            rows, range(count), [1] * count, [[0]] * count, torch.stack([rows, -rows])
        )
        assert [x.tolist() for x in found] == [(f * rows).tolist() for f in (2, -1, 1)]
    assert graphs.bucket(3) == 4


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (3, [1, 2, 3]), (20, [1, 2, 4, 8, 16, 20])])
def test_the_last_bucket_is_the_largest_batch(most, sizes):
    assert language_model(max_batch=most)[0].buckets == sizes


def test_a_capture_that_fails_leaves_the_model_without_graphs(monkeypatch):
    def fails():
        def capture(step):
            raise RuntimeError("no memory")

        return capture

    monkeypatch.setattr(lm_module, "record", fails)
    lm, runtime = language_model()
    lm._use_graphs = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            lm.warmup()
        assert lm.graphs is None
    assert results(decode(lm, [1, 2], GREEDY), runtime=runtime) == [alone([1, 2], GREEDY)]


def test_ids_are_gathered_from_the_host_and_from_earlier_batches():
    one, two = Tokens(torch.tensor([10, 11, 12])), Tokens(torch.tensor([20, 21]))
    cpu = torch.device("cpu")

    def ids(*parts):
        parts = [Step(p[0], p[1], None) if isinstance(p, tuple) else p for p in parts]
        return gather_ids(parts, cpu).tolist()

    assert ids([1, 2], [3]) == [1, 2, 3]
    assert ids((one, 0), (one, 1), (one, 2)) == [10, 11, 12]
    assert ids((one, 1), (one, 2)) == [11, 12]
    assert ids((one, 2), (one, 0)) == [12, 10]
    assert ids((two, 1), [1, 2], (one, 2), [3], (two, 0)) == [21, 1, 2, 12, 3, 20]
