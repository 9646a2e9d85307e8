"""Spans of two experts: who runs what, in any batch."""

from __future__ import annotations

import pytest
import torch
from tiny_lm import CONFIG, network, prompt_of
from torch import nn
from walks import results

from mstar.engine.kvcache import KVPool
from mstar.engine.layers.attention import GrowingContext, HeadNorms, Projected
from mstar.engine.lm import LanguageModel, Span
from mstar.engine.runtime import Runtime
from mstar.engine.traps import gather


class TwoExperts(nn.Module):
    """Two Llamas of the same shape that attend to each other's tokens, with norms on the heads."""

    kv_layout = network().kv_layout
    vocab_size = CONFIG.vocab_size

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([network(seed=1), network(seed=2)])
        weights = torch.linspace(0.5, 1.5, 4 * CONFIG.head_dim).view(4, -1)
        self.norms = [HeadNorms(*weights[:2], 1e-6), HeadNorms(*weights[2:], 1e-6)]

    def embed(self, ids):
        return self.experts[0].embed(ids)

    def logits(self, hidden):
        return self.experts[0].logits(hidden)

    def forward(self, inputs, positions, context, lead=0):
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        angles = self.experts[0].rotary.angles(positions)
        streams = [(self.experts[1], self.norms[1], x[:lead]), (self.experts[0], None, x[lead:])]
        streams[1] = (self.experts[0], self.norms[0], x[lead:])
        for index in range(CONFIG.num_hidden_layers):
            layers = [expert.model.layers[index] for expert, _, _ in streams]
            parts = [
                Projected(layer.self_attn.qkv_proj(self._norm(h, layer.input_layernorm)), norms)
                for layer, (_, norms, h) in zip(layers, streams, strict=True)
                if len(h)
            ]
            out = context.attend(index, parts, angles, 2, 1).split([lead, len(x) - lead])
            streams = [
                (expert, norms, h + layer.self_attn.o_proj(attended))
                for (expert, norms, h), layer, attended in zip(streams, layers, out, strict=True)
            ]
        return torch.cat([h for _, _, h in streams])

    def _norm(self, x, weight):
        return nn.functional.rms_norm(x, weight.weight.shape, weight.weight, 1e-6)


NETWORK = TwoExperts().eval().requires_grad_(False)


def two_experts(pages=64, **options):
    pool = KVPool(NETWORK.kv_layout, pages * 4, page_size=4)
    lm = LanguageModel("lm", NETWORK, pool, **options)
    runtime = Runtime()
    lm.bind(runtime.schedule)
    return lm, runtime


def embeddings(count, seed):
    return torch.randn(count, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))


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
        for keep in (False, True):
            span = Span(
                kv, image, len(image), positions, causal=False, keep=keep, lead=lead, hidden=True
            )
            step = await lm(span)
        after = await lm(Span(kv, [1, 2], 2, hidden=True))
        return step.hidden, after.hidden


def cases():
    for number, (text, size, lead) in enumerate([(5, 9, 7), (11, 6, 6), (3, 17, 15)]):
        yield prompt_of(text, number), embeddings(size, number), lead


def expected(text, image, lead):
    spans = [
        (torch.tensor(text), None, 0),
        (image, [len(text)] * len(image), lead),
        (torch.tensor([1, 2]), None, 0),
    ]
    _, drawn, after = plainly(*spans)
    return drawn[:lead], after


def test_one_span_goes_to_both_experts():
    for case in cases():
        lm, runtime = two_experts()
        (found,) = results(image_after_text(lm, *case), runtime=runtime)
        for one, other in zip(found, expected(*case), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_spans_of_both_kinds_share_batches():
    lm, runtime = two_experts(span_budget=100)
    found = results(*(image_after_text(lm, *case) for case in cases()), runtime=runtime)
    for states, case in zip(found, cases(), strict=True):
        for one, other in zip(states, expected(*case), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
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


def test_a_lead_must_fit_and_cannot_be_causal():
    for lead, causal in ((3, True), (10, False)):
        lm, runtime = two_experts()

        async def walk(lm=lm, lead=lead, causal=causal):
            with lm.open_cache() as kv:
                await lm(Span(kv, embeddings(9, 0), 9, causal=causal, lead=lead))

        with pytest.raises(ValueError, match=f"lead={lead}"):
            results(walk(), runtime=runtime)
