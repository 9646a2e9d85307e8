"""Spans of two experts: who runs what, in any batch."""

from __future__ import annotations

import pytest
import torch
from tiny_experts import NETWORK, embeddings, two_experts
from tiny_lm import prompt_of
from walks import results

from mstar.engine.layers.attention import GrowingContext
from mstar.engine.lm import Span
from mstar.engine.traps import gather


def plainly(*spans):
    """Hidden states of spans (inputs, positions, lead) one after the other, without the engine."""
    context, start, found = GrowingContext(), 0, []
    for inputs, positions, lead in spans:
        context.causal = not lead
        where = torch.tensor(positions or range(start, start + len(inputs)))
        found.append(NETWORK(inputs, where, context, lead))
        start += len(inputs)
    return found


async def image_after_text(lm, text, image, lead):
    with lm.open_cache() as kv:
        await lm.feed(kv, text)
        positions = [len(text)] * len(image)
        await lm(Span(kv, image, len(image), positions, causal=False, lead=lead))
        return (await lm(Span(kv, [1, 2], 2, hidden=True))).hidden


def cases():
    for number, (text, size, lead) in enumerate([(5, 9, 7), (11, 6, 6), (3, 17, 15)]):
        yield prompt_of(text, number), embeddings(size, number), lead


def expected(text, image, lead):
    spans = [
        (torch.tensor(text), None, 0),
        (image, [len(text)] * len(image), lead),
        (torch.tensor([1, 2]), None, 0),
    ]
    return plainly(*spans)[-1]


def test_one_span_goes_to_both_experts():
    for case in cases():
        lm, runtime = two_experts()
        (found,) = results(image_after_text(lm, *case), runtime=runtime)
        torch.testing.assert_close(found, expected(*case), atol=1e-5, rtol=1e-5)


def test_spans_of_both_kinds_share_batches():
    lm, runtime = two_experts(span_budget=100)
    found = results(*(image_after_text(lm, *case) for case in cases()), runtime=runtime)
    for states, case in zip(found, cases(), strict=True):
        torch.testing.assert_close(states, expected(*case), atol=1e-5, rtol=1e-5)
    assert max(lm.batch_sizes) == 3
    assert lm.pool.table.used == 0


def test_long_spans_share_a_batch_only_within_the_budget():
    async def both(lm):
        with lm.open_cache() as one, lm.open_cache() as two:
            image = embeddings(9, 0)
            spans = [Span(kv, image, 9, causal=False, lead=7) for kv in (one, two)]
            await gather(*map(lm, spans))

    for budget, largest in ((8, 1), (9, 1), (18, 2)):
        lm, runtime = two_experts(token_budget=8, span_budget=budget)
        results(both(lm), runtime=runtime)
        assert max(lm.batch_sizes) == largest


def test_a_lead_must_fit_and_cannot_be_causal_or_give_its_states():
    for lead, causal, hidden in ((3, True, False), (10, False, False), (3, False, True)):
        lm, runtime = two_experts()

        async def walk(lm=lm, **options):
            with lm.open_cache() as kv:
                await lm(Span(kv, embeddings(9, 0), 9, **options))

        with pytest.raises(ValueError, match=f"lead={lead}"):
            results(walk(lead=lead, causal=causal, hidden=hidden), runtime=runtime)
