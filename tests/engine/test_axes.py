"""Rotary positions with three axes or between integers, and prompts with media in causal order."""

from __future__ import annotations

import pytest
import torch
from test_graphs import BUCKETS, Decode
from tiny_lm import GREEDY, NETWORK, alone, language_model, prompt_of
from walks import results

from mstar.engine.content import media_content
from mstar.engine.graphs import DecodeGraphs
from mstar.engine.kvcache import KVPool
from mstar.engine.layers.attention import GrowingContext
from mstar.engine.layout import Layout
from mstar.engine.lm import Span
from mstar.engine.prefill import PromptSpan, prefill_causal
from mstar.types import Usage
from tests.recording import replays

TEXT, QUESTION = prompt_of(9), prompt_of(13, 1)


class Leaning:
    """A network that turns by the second of its axes, and remembers what it was given."""

    kv_layout, vocab_size = NETWORK.kv_layout, NETWORK.vocab_size
    embed, logits = NETWORK.embed, NETWORK.logits

    def __init__(self):
        self.given = []

    def __call__(self, inputs, positions, context):
        self.given.append(positions)
        return NETWORK(inputs, positions[1] if positions.dim() == 2 else positions, context)


class Clip:
    """A medium of seven tokens that look like text; counts how often it is embedded."""

    ids = prompt_of(7, 3)

    def __init__(self):
        self.embedded = 0

    async def embed(self):
        self.embedded += 1
        return NETWORK.embed(torch.tensor(self.ids))


def axes(first, count, step=1.0):
    places = torch.arange(count) * step + first
    return torch.stack([places * 0, places, places * 2])


def prompt(clip, question=QUESTION):
    """Text, a clip whose tokens are half a position apart, text."""
    return [
        PromptSpan(TEXT, axes(0, 9)),
        PromptSpan(media_content(b"clip", 7), axes(9, 7, 0.5), clip.embed),
        PromptSpan(question, axes(12.5, len(question))),
    ]


def plain_answer(question=QUESTION):
    context, tokens = GrowingContext(), []
    ids = [*TEXT, *Clip.ids, *question]
    places = torch.cat([span.positions[1] for span in prompt(Clip(), question)])
    step = torch.tensor(ids)
    for _ in range(GREEDY.max_tokens):
        hidden = NETWORK(step, places, context)
        step = NETWORK.logits(hidden[-1:]).argmax(-1)
        places = places[-1:] + 1
        tokens += step.tolist()
    return tokens


async def answer(lm, clip, usage, heard=None, most=None, question=QUESTION):
    spans = prompt(clip, question)
    content = [number for span in spans for number in span.content]

    async def feed(sampler):
        hear = None if heard is None else lambda first, hidden: heard.append((first, hidden))
        return await prefill_causal(
            lm, kv, spans, sampler=sampler, usage=usage, most_reused=most, hear=hear
        )

    with lm.open_cache() as kv:
        kv.offset = 12.5 - 16
        return [token async for token in lm.generate(kv, content, GREEDY, feed=feed)]


@pytest.mark.parametrize("budget", [4, 512])
def test_media_are_fed_in_chunks_like_text(budget):
    lm, runtime = language_model(model=Leaning(), token_budget=budget)
    usage, heard = Usage(), []
    (found,) = results(answer(lm, Clip(), usage, heard), runtime=runtime)
    assert found == plain_answer()
    assert (usage.prompt_tokens, usage.cached_tokens) == (29, 0)
    assert [first for first, _ in heard] == list(range(0, 29, budget))
    whole = torch.cat([hidden for _, hidden in heard])
    spans = prompt(Clip())
    ids = torch.tensor([*TEXT, *Clip.ids, *QUESTION])
    places = torch.cat([span.positions[1] for span in spans])
    torch.testing.assert_close(whole, NETWORK(ids, places, GrowingContext()), atol=1e-5, rtol=0)


def test_a_clip_is_embedded_only_where_the_cache_ends_before_it_does():
    lm, runtime = language_model(model=Leaning())
    clip = Clip()
    for most, cached, embedded in (
        (None, 0, 1),
        (None, 28, 1),
        (16, 16, 1),
        (15, 12, 2),
        (9, 8, 3),
    ):
        usage = Usage()
        (found,) = results(answer(lm, clip, usage, most=most), runtime=runtime)
        assert found == plain_answer()
        assert (usage.cached_tokens, clip.embedded) == (cached, embedded)
    other = prompt_of(5, 8)
    usage = Usage()
    (found,) = results(answer(lm, clip, usage, question=other), runtime=runtime)
    assert found == plain_answer(other)
    assert usage.cached_tokens == 16
    assert lm.pool.table.used == 0


def test_sequences_with_and_without_axes_share_a_batch():
    lm, runtime = language_model(model=Leaning())

    async def plain(seed):
        with lm.open_cache() as kv:
            return [token async for token in lm.generate(kv, prompt_of(8, seed), GREEDY)]

    found = results(answer(lm, Clip(), Usage()), *(plain(seed) for seed in (1, 2)), runtime=runtime)
    expected = [alone(prompt_of(8, seed), GREEDY)[0] for seed in (1, 2)]
    assert found == [plain_answer(), *expected]
    assert max(lm.batch_sizes) == 3
    kinds = {(places.dim(), places.dtype) for places in lm.network.given}
    assert kinds == {(2, torch.float32), (1, torch.float32)}


def test_positions_of_a_batch_are_integers_as_long_as_all_are():
    pool = KVPool(NETWORK.kv_layout, 64)

    def span(offset, count=2, **more):
        kv = pool.open()
        kv.length, kv.offset = 5, offset
        return Span(kv, [1] * count, count, **more)

    assert Layout([span(0), span(-3)]).positions == [5, 6, 2, 3]
    assert Layout([span(0), span(0.5)]).positions.tolist() == [5, 6, 5.5, 6.5]
    both = Layout([span(0, 1), span(0, positions=axes(3, 2))]).positions
    assert both.tolist() == [[5, 0, 0], [5, 3, 4], [5, 6, 8]]
    with pytest.raises(ValueError, match="3 positions for a span of 2"):
        span(0, positions=axes(0, 3)).check()


@pytest.mark.parametrize("offset", [0, -2, 0.5])
def test_captured_steps_between_integers_choose_the_same(offset):

    async def walk(lm, seed):
        sampler = lm.sampler.open(GREEDY, ())
        tokens = []
        with lm.open_cache() as kv:
            kv.offset = offset
            step = await lm(Span(kv, prompt_of(5, seed), 5, sampler=sampler))
            for _ in range(6):
                tokens.append(step.token)
                step = await lm(Span(kv, step, 1, sampler=sampler, hidden=True))
                tokens.append(round(float(step.hidden.sum()), 3))
        return tokens

    found = []
    for graphs in (False, True):
        lm, runtime = language_model(fractions=True)
        step = Decode(lm)
        if graphs:
            shape = lm.pool, BUCKETS, lm.pool.capacity, replays
            lm.graphs = DecodeGraphs(step, *shape, fractions=True)
        with torch.inference_mode():
            found.append(results(*(walk(lm, seed) for seed in range(3)), runtime=runtime))
        assert bool(step.sizes) == graphs
    for plain, captured in zip(*found, strict=True):
        assert captured[::2] == plain[::2]
        assert captured[1::2] == pytest.approx(plain[1::2], abs=2e-3)
