from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_lm import CONFIG, GREEDY, NETWORK, alone, decode, language_model, network, prompt_of
from walks import Gate, Outcome, outcomes, results, settle

from mstar.engine.layers.rotary import rotate
from mstar.engine.lm import LanguageModel
from mstar.engine.node import Node
from mstar.engine.sampling import SamplingParams
from mstar.engine.spans import Span
from mstar.engine.traps import bind_thread, gather, spawn
from mstar.errors import OutOfMemory, RequestFailed
from mstar.types import Usage

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def inference():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is so small that a second one only gets in the way
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def dense(model, ids, params):
    """Tokens by running the whole sequence anew for every token, greedily."""
    ids, new = list(ids), []
    while len(new) < params.max_tokens:
        token = int(model.logits(model(torch.tensor(ids))[-1:]).argmax())
        new.append(token)
        ids.append(token)
    return new


# -- prefill and decode --------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4, 5, 30])
def test_decoding_equals_running_the_whole_sequence_every_time(length):
    prompt = prompt_of(length)
    assert alone(prompt, GREEDY) == (dense(NETWORK, prompt, GREEDY), "length")


@pytest.mark.parametrize("token_budget", [1, 3, 8, 64])
def test_a_prompt_in_chunks_equals_the_prompt_in_one(token_budget):
    prompt = prompt_of(30)
    lm, runtime = language_model(token_budget=token_budget)

    async def walk():
        with lm.open_cache() as kv:
            spans = []
            for first in range(0, 30, token_budget):
                chunk = prompt[first : first + token_budget]
                spans.append((await lm(Span(kv, chunk, len(chunk), hidden=True))).hidden)
            return torch.cat(spans)

    (hidden,) = results(walk(), runtime=runtime)
    torch.testing.assert_close(hidden, NETWORK(torch.tensor(prompt)), atol=1e-5, rtol=1e-5)
    assert alone(prompt, GREEDY, token_budget=token_budget) == alone(prompt, GREEDY)


def test_prefill_and_decode_share_batches_within_the_token_budget():
    lm, runtime = language_model(token_budget=8)
    seen = []
    run = lm.run
    lm.run = lambda spans: seen.append([span.count for span in spans]) or run(spans)
    cases = [
        (prompt_of(n, n), replace(GREEDY, max_tokens=m)) for n, m in ((3, 20), (20, 5), (4, 9))
    ]
    found = results(*(decode(lm, p, s) for p, s in cases), runtime=runtime)
    assert found == [alone(p, s) for p, s in cases]
    assert any(1 in batch and max(batch) > 1 for batch in seen)
    assert all(sum(n for n in batch if n > 1) <= 8 for batch in seen)


def test_at_most_max_batch_sequences_run_at_a_time_eldest_first():
    lm, runtime = language_model(max_batch=2)
    order = []

    async def walk(n):
        await decode(lm, prompt_of(3, n), GREEDY)
        order.append(n)

    results(*(walk(n) for n in range(5)), runtime=runtime)
    assert order == [0, 1, 2, 3, 4]
    assert max(lm.batch_sizes) == 2


def test_an_empty_prompt_is_an_error_of_that_walk():
    lm, runtime = language_model()
    bad, good = outcomes(decode(lm, [], GREEDY), decode(lm, prompt_of(4), GREEDY), runtime=runtime)
    assert "a span of 0 tokens" in str(bad.error)
    assert good.value == alone(prompt_of(4), GREEDY)


def test_spans_whose_parts_do_not_fit_together_are_refused():
    lm, runtime = language_model()

    async def walk():
        with lm.open_cache() as kv:
            step = await lm(Span(kv, [1], 1))
            with pytest.raises(RuntimeError, match="had no sampler"):
                _ = step.token
            for span in (
                Span(kv, [1, 2], 3),
                Span(kv, step, 1),
                Span(kv, [1, 2], 2, positions=[0]),
                Span(kv, [1, 2], 2, content=[1]),
            ):
                with pytest.raises(ValueError, match=r"span of \d tokens"):
                    await lm(span)
            return kv.length, kv.group.waiting

    assert results(walk(), runtime=runtime) == [(1, 0)]


def test_a_failing_sequence_leaves_the_others_of_its_batch_as_they_were():
    """Also those whose penalties and draws depend on how many tokens were chosen."""
    lm, runtime = language_model()
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.1, max_tokens=15)
    cases = [(prompt_of(5, n), replace(params, seed=n)) for n in range(4)]
    bad = [1, 2, CONFIG.vocab_size]
    ends = outcomes(*(decode(lm, p, s) for p, s in cases), decode(lm, bad, params), runtime=runtime)
    assert isinstance(ends[-1].error, IndexError)
    assert [end.value for end in ends[:-1]] == [alone(p, s) for p, s in cases]
    assert lm.pool.table.used == 0


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_numbers_fail_only_their_request(look_ahead, temperature):
    class Poisoned(type(NETWORK)):
        def logits(self, hidden):
            scores = super().logits(hidden)
            scores[self.seen == 13] = torch.nan
            return scores

        def forward(self, inputs, positions=None, context=None, **keywords):
            self.seen = inputs
            return super().forward(inputs, positions, context, **keywords)

    model = network()
    model.__class__ = Poisoned
    lm, runtime = language_model(model=model, look_ahead=look_ahead)
    params = replace(GREEDY, temperature=temperature)
    good = [p for p in ([n] for n in range(13)) if 13 not in alone(p, params)[0]][:3]
    assert good
    ends = outcomes(
        decode(lm, [13], params), *(decode(lm, p, params) for p in good), runtime=runtime
    )
    assert isinstance(ends[0].error, RequestFailed)
    assert [end.value for end in ends[1:]] == [alone(p, params) for p in good]
    assert lm.pool.table.used == 0


def test_a_span_may_follow_another_of_its_own_sequence_before_that_has_run():
    lm, runtime = language_model()
    ids = prompt_of(7)

    async def walk():
        with lm.open_cache() as kv:
            calls = [
                lm(Span(kv, ids[i : i + 2], len(ids[i : i + 2]), hidden=True)) for i in (0, 2, 4, 6)
            ]
            return torch.cat([step.hidden for step in await gather(*calls)])

    (hidden,) = results(walk(), runtime=runtime)
    torch.testing.assert_close(hidden, NETWORK(torch.tensor(ids)), atol=1e-5, rtol=1e-5)


# -- how generations end -------------------------------------------------------------------------


ENDS = {
    "length": {},
    "one token": {"max_tokens": 1},
    "no token": {"max_tokens": 0},
    "stops": {"stop": [3]},
    "stops at once": {"stop": [0]},
    "stops at the last": {"stop": [11]},
    "may not stop yet": {"stop": [0, 5], "min_tokens": 4},
    "one and stops": {"stop": [0], "max_tokens": 1},
    "sampled": {"temperature": 1.0, "repetition_penalty": 1.2, "top_p": 0.9},
}


@pytest.mark.parametrize("case", ENDS)
def test_look_ahead_changes_nothing_that_a_walk_sees(case):
    options = dict(ENDS[case])
    prompt = prompt_of(6)
    plain = replace(GREEDY, **{k: v for k, v in options.items() if k != "stop"})
    free = alone(prompt, replace(plain, min_tokens=0))[0]
    stops = frozenset(free[i] for i in options.get("stop", []) if i < len(free))
    params = replace(plain, stop_ids=stops)

    def run(look_ahead):
        lm, runtime = language_model(look_ahead=look_ahead)
        usage = Usage()

        async def walk():
            with lm.open_cache() as kv:
                generation = lm.generate(kv, prompt, params, usage=usage)
                tokens = [token async for token in generation]
                return tokens, generation.finish_reason, kv.length, list(kv._content)

        (found,) = results(walk(), runtime=runtime)
        findable = []
        with lm.open_cache() as kv:
            findable.append(kv.reuse([*prompt, *found[0], 0]))
        return found, usage.generated_tokens, usage.prompt_tokens, findable

    assert run(True) == run(False)
    tokens, reason, length, _ = run(True)[0]
    assert reason == ("stop" if {*free[params.min_tokens :]} & stops else "length")
    assert length == len(prompt) + max(len(tokens) - (reason == "length"), 0)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_walk_that_leaves_the_loop_finds_the_cache_as_without_look_ahead(look_ahead):
    lm, runtime = language_model(look_ahead=look_ahead)
    prompt = prompt_of(6)

    async def walk():
        with lm.open_cache() as kv:
            tokens = []
            async for token in lm.generate(kv, prompt, GREEDY):
                tokens.append(token)
                if len(tokens) == 4:
                    break
            assert kv.length == len(prompt) + 3
            await lm.feed(kv, tokens[3:])
            step = await lm.feed(kv, [1], sampler=lm.sampler.open(GREEDY, []))
            return tokens, step.token

    ((tokens, last),) = results(walk(), runtime=runtime)
    assert tokens == alone(prompt, GREEDY)[0][:4]
    assert last == dense(NETWORK, [*prompt, *tokens, 1], replace(GREEDY, max_tokens=1))[0]


def test_stop_tokens_are_not_among_the_tokens_and_min_tokens_holds_them_back():
    prompt = prompt_of(6)
    free = alone(prompt, GREEDY)[0]
    stop = frozenset(free[2:3])
    tokens, reason = alone(prompt, replace(GREEDY, stop_ids=stop))
    assert (tokens, reason) == (free[: free.index(free[2])], "stop")
    tokens, _ = alone(prompt, replace(GREEDY, stop_ids=stop, min_tokens=8))
    assert len(tokens) >= 8
    assert not stop & set(tokens)


# -- draws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_sampled_requests_give_the_tokens_that_they_give_alone(top_p):
    """At temperature 1, over a vocabulary of which no token is likely.

    A batch changes the last bits of the logits, so two tokens that come out of the noise that close
    could still change places: by the size of those bits, less than one draw in 10,000. The seeds
    are the first that come.
    """
    model = network(replace(CONFIG, vocab_size=4000, hidden_size=64))
    cases = [
        (
            np.random.default_rng(n).integers(4000, size=3 + n % 9).tolist(),
            SamplingParams(top_p=top_p, max_tokens=24, seed=n),
        )
        for n in range(24)
    ]
    lm, runtime = language_model(model=model)
    together = results(*(decode(lm, p, s) for p, s in cases), runtime=runtime)
    assert max(lm.batch_sizes) == 24
    solo = [alone(p, s, model=model) for p, s in cases]
    assert len({tuple(tokens) for tokens, _ in solo}) == 24
    assert together == solo


# -- the prefix cache ----------------------------------------------------------------------------


def test_the_prefix_cache_changes_no_token():
    shared = prompt_of(18)
    cases = [(shared + prompt_of(n, n), replace(GREEDY, seed=n)) for n in (1, 2, 7, 2)]
    lm, runtime = language_model()
    usages = [Usage() for _ in cases]
    for (prompt, params), usage in zip(cases, usages, strict=True):
        (found,) = results(decode(lm, prompt, params, usage), runtime=runtime)
        assert found == alone(prompt, params, prefix_cache=False)
    assert [usage.cached_tokens for usage in usages] == [0, 16, 16, 16]
    assert usages[2].prompt_tokens == 25


def test_a_finished_sequence_can_be_continued_from_the_cache():
    lm, runtime = language_model()
    prompt = prompt_of(10)
    ((tokens, _),) = results(decode(lm, prompt, GREEDY), runtime=runtime)
    usage = Usage()
    longer = [*prompt, *tokens, 5]
    (found,) = results(decode(lm, longer, GREEDY, usage), runtime=runtime)
    assert usage.cached_tokens == (len(longer) - 2) // 4 * 4
    assert found == alone(longer, GREEDY)


# -- spans of other kinds ------------------------------------------------------------------------


class Full:
    """Dense attention with an explicit mask."""

    def __init__(self, mask):
        self.mask = mask

    def attend(self, layer, parts, angles, heads, kv_heads):
        ((qkv, _),) = parts
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split(
            [heads, kv_heads, kv_heads], 1
        )
        q, k = rotate(q, *angles), rotate(k, *angles)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


def mask_of(*spans):
    """Who sees whom: a list of (count, causal)."""
    total = sum(count for count, _ in spans)
    mask, start = torch.zeros(total, total, dtype=torch.bool), 0
    for count, causal in spans:
        block = torch.ones(count, count, dtype=torch.bool)
        mask[start : start + count, start : start + count] = block.tril() if causal else block
        mask[start : start + count, :start] = True
        start += count
    return mask


def test_a_full_span_sees_all_of_itself():
    ids = torch.tensor(prompt_of(15))
    lm, runtime = language_model()

    async def walk():
        with lm.open_cache() as kv:
            counts, parts, start = [(5, True), (6, False), (4, True)], [], 0
            for count, causal in counts:
                chunk = ids[start : start + count].tolist()
                parts.append((await lm(Span(kv, chunk, count, causal=causal, hidden=True))).hidden)
                start += count
            return torch.cat(parts)

    (hidden,) = results(walk(), runtime=runtime)
    expected = NETWORK(ids, context=Full(mask_of((5, True), (6, False), (4, True))))
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-5)


def test_embeddings_may_take_the_place_of_ids_next_to_sequences_of_ids():
    ids = prompt_of(9)
    lm, runtime = language_model()
    params = replace(GREEDY, max_tokens=5)

    async def walk():
        with lm.open_cache() as kv:
            embedded = NETWORK.embed(torch.tensor(ids[:6]))
            await lm(Span(kv, embedded, 6))
            sampler = lm.sampler.open(params, ids)
            step = await lm(Span(kv, ids[6:], 3, sampler=sampler))
            tokens = [step.token]
            while len(tokens) < 5:
                step = await lm(Span(kv, step, 1, sampler=sampler))
                tokens.append(step.token)
            return tokens

    found = results(walk(), decode(lm, ids, params), runtime=runtime)
    assert found == [alone(ids, params)[0], alone(ids, params)]


def test_positions_may_be_given():
    ids, positions = prompt_of(6), [0, 1, 1, 1, 5, 9]
    lm, runtime = language_model()

    async def walk():
        with lm.open_cache() as kv:
            parts = [
                (await lm(Span(kv, ids[i : i + 3], 3, positions=positions[i : i + 3], hidden=True)))
                for i in (0, 3)
            ]
            return torch.cat([part.hidden for part in parts])

    (hidden,) = results(walk(), runtime=runtime)
    expected = NETWORK(torch.tensor(ids), torch.tensor(positions))
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


# -- when pages run out --------------------------------------------------------------------------


def test_a_sequence_that_can_never_fit_is_refused_with_numbers_and_others_go_on():
    lm, runtime = language_model(pages=8, token_budget=16)
    small = [(prompt_of(5, n), GREEDY) for n in range(4)]
    ends = outcomes(
        *(decode(lm, p, s) for p, s in small[:2]),
        decode(lm, prompt_of(33), GREEDY),
        decode(lm, prompt_of(30, 1), replace(GREEDY, max_tokens=50)),
        *(decode(lm, p, s) for p, s in small[2:]),
        runtime=runtime,
    )
    for end in ends[2:4]:
        assert isinstance(end.error, OutOfMemory)
        assert "holds 32 tokens, too few for a sequence of 33" in str(end.error)
    assert [end.value for end in ends[:2] + ends[4:]] == [alone(p, s) for p, s in small]
    assert lm.pool.table.used == 0


def test_a_refused_sequence_that_stays_open_does_not_hold_up_the_others():
    lm, runtime = language_model(pages=8, prefix_cache=False)
    gate = Gate()

    async def stubborn():
        with lm.open_cache() as kv:
            await lm.feed(kv, prompt_of(32))
            with pytest.raises(OutOfMemory):
                await lm.feed(kv, [1])
            await gate.wait()
            return kv.length

    ends = [Outcome(), Outcome()]
    runtime.spawn(stubborn(), waiter=ends[0])
    runtime.spawn(decode(lm, prompt_of(20), GREEDY), waiter=ends[1])
    settle(runtime)
    assert ends[1].value == alone(prompt_of(20), GREEDY)
    gate.open()
    settle(runtime)
    assert ends[0].value == 32


def test_a_refusal_that_ends_a_gather_does_not_strand_others():
    lm, runtime = language_model(pages=8, max_batch=1, prefix_cache=False)

    async def pair():
        with lm.open_cache() as one, lm.open_cache() as two, pytest.raises(OutOfMemory):
            await gather(lm.feed(one, prompt_of(40)), lm.feed(two, prompt_of(3)))

    ends = outcomes(pair(), decode(lm, prompt_of(20), GREEDY), runtime=runtime)
    assert [end.error for end in ends] == [None, None]


def test_a_walk_that_holds_an_idle_cache_can_be_preempted_and_resumes_identically():
    lm, runtime = language_model(pages=10)
    gate = Gate()
    prompt = prompt_of(20)

    async def idler():
        with lm.open_cache() as kv:
            sampler = lm.sampler.open(GREEDY, prompt)
            step = await lm.feed(kv, prompt, sampler=sampler)
            await gate.wait()
            assert kv.group.is_out
            tokens = [step.token]
            while len(tokens) < GREEDY.max_tokens:
                step = await lm(Span(kv, step, 1, sampler=sampler, content=tokens[-1:]))
                tokens.append(step.token)
            return tokens

    end, other = Outcome(), Outcome()
    runtime.spawn(idler(), waiter=end)
    settle(runtime)
    runtime.spawn(decode(lm, prompt_of(25, 1), GREEDY), waiter=other)
    settle(runtime)
    assert other.value == alone(prompt_of(25, 1), GREEDY)
    gate.open()
    settle(runtime)
    assert end.value == alone(prompt, GREEDY)[0]
    assert lm.pool.preemptions == 1


def test_two_nodes_may_share_a_pool():
    one, runtime = language_model(pages=8, prefix_cache=False)
    two = LanguageModel("two", NETWORK, one.pool)
    two.bind(runtime.schedule)

    async def walk(n):
        first, second = (one, two) if n % 2 else (two, one)
        return await gather(
            decode(first, prompt_of(14, n), GREEDY), decode(second, prompt_of(9, n), GREEDY)
        )

    found = results(*(walk(n) for n in range(6)), runtime=runtime)
    for n, pair in enumerate(found):
        assert pair == [alone(prompt_of(14, n), GREEDY), alone(prompt_of(9, n), GREEDY)]
    assert one.pool.table.used == 0
    assert one.pool.preemptions > 0


def test_a_sequence_that_waits_for_pages_hears_when_another_node_lets_go_of_them():
    one, runtime = language_model(pages=8, prefix_cache=False)
    two = LanguageModel("two", NETWORK, one.pool)
    two.bind(runtime.schedule)
    gates, ends = (Gate(), Gate()), (Outcome(), Outcome())

    async def elder():
        with one.open_cache() as kv:
            await one.feed(kv, prompt_of(23))
            await gates[0].wait()
            await two(Span(kv, [1], 1))
            await gates[1].wait()

    runtime.spawn(elder(), waiter=ends[0])
    settle(runtime)
    runtime.spawn(decode(one, prompt_of(20), GREEDY), waiter=ends[1])
    gates[0].open()
    settle(runtime)
    assert ends[1].value == alone(prompt_of(20), GREEDY)
    gates[1].open()
    settle(runtime)
    assert (ends[0].told, one.pool.table.used) == (1, 0)


async def forked(lm, prompt, params):
    """Two continuations of one prompt, token by token."""
    with lm.open_cache() as kv:
        sampler = lm.sampler.open(params, prompt)
        await lm.feed(kv, prompt[:-1])
        with kv.fork() as other:
            branches = []
            for cache, last in ((kv, prompt[-1]), (other, (prompt[-1] + 1) % CONFIG.vocab_size)):
                branches.append(continued(lm, cache, last, params))
            lm.sampler.close(sampler)
            return await gather(*branches)


async def continued(lm, kv, last, params):
    sampler = lm.sampler.open(params, [last])
    step = await lm(Span(kv, [last], 1, sampler=sampler, content=[last]))
    tokens = [step.token]
    while len(tokens) < params.max_tokens:
        step = await lm(Span(kv, step, 1, sampler=sampler, content=tokens[-1:]))
        tokens.append(step.token)
    lm.sampler.close(sampler)
    return tokens


async def two_caches(lm, prompt, params):
    """The first answer is the prompt of a second sequence while the first stays open."""
    with lm.open_cache() as kv, lm.open_cache() as other:
        tokens = [token async for token in lm.generate(kv, prompt, params)]
        task = spawn(collect(lm, other, [*tokens, 1], params))
        again = await lm.feed(kv, [2, 3], sampler=lm.sampler.open(params, []))
        return tokens, await task, again.token


async def collect(lm, kv, prompt, params):
    return [token async for token in lm.generate(kv, prompt, params)]


@pytest.mark.parametrize("look_ahead", [False, True])
def test_500_requests_on_a_tiny_cache_end_as_if_each_were_alone(look_ahead):
    rng = random.Random(1)
    lm, runtime = language_model(pages=24, max_batch=8, token_budget=12, look_ahead=look_ahead)
    pause = Node("pause", lambda batch: batch, max_batch=3)
    prefixes = [prompt_of(n, n) for n in (8, 13, 21)]

    def request(number):
        prompt = prompt_of(rng.randint(1, 24), number)
        if rng.random() < 0.5:
            prompt = rng.choice(prefixes) + prompt[: rng.randint(1, 8)]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            max_tokens=rng.randint(1, 14),
            stop_ids=frozenset(rng.sample(range(CONFIG.vocab_size), 1)),
            seed=number,
        )
        return rng.choice([decode, decode, decode, forked, two_caches]), prompt, params

    async def walk(kind, prompt, params, delay):
        for _ in range(delay):
            await pause(0)
        return await kind(lm, prompt, params)

    requests = [request(n) for n in range(500)]
    ends = [Outcome() for _ in requests]
    arrivals = sorted(rng.randint(0, 1500) for _ in requests)
    cancels = {n: arrivals[n] + rng.randint(0, 60) for n in range(500) if rng.random() < 0.15}
    tasks, turn = {}, 0
    bind_thread(runtime)
    while True:
        for n, at in enumerate(arrivals):
            if n not in tasks and at <= turn:
                delay = rng.choice([0, 0, 2])
                tasks[n] = runtime.spawn(walk(*requests[n], delay), waiter=ends[n])
        for n, at in cancels.items():
            if n in tasks and at <= turn:
                tasks[n].withdraw()
        if len(tasks) == 500 and all(task.done for task in tasks.values()):
            break
        busy = runtime.ready or runtime._due
        assert busy or len(tasks) < 500, "deadlock"
        turn += 1
        assert turn < 50_000, "livelock"
        runtime.turn()
    bind_thread(None)

    assert lm.pool.preemptions > 0
    assert lm.pool.table.hits > 0
    assert lm.pool.table.used == 0
    assert not lm.pool.groups
    assert lm.waiting == 0
    survivors = [n for n, end in enumerate(ends) if end.told]
    assert len(survivors) > 400
    assert [ends[n].error for n in survivors] == [None] * len(survivors)
    roomy, other = language_model(pages=256, look_ahead=False)
    for n in survivors:
        kind, prompt, params = requests[n]
        assert results(kind(roomy, prompt, params), runtime=other) == [ends[n].value]
