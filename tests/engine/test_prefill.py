"""Prompts of text and media: what is fed, what is reused, where generation goes on."""

from __future__ import annotations

import torch
from tiny_experts import NETWORK, embeddings, two_experts
from tiny_lm import GREEDY, prompt_of
from walks import results

from mstar.engine.content import media_content
from mstar.engine.layers.attention import GrowingContext
from mstar.engine.prefill import PromptSpan, prefill
from mstar.types import Usage

TEXT, QUESTION = prompt_of(10), prompt_of(13, 1)
IMAGE = embeddings(11, 0)


class Picture:
    """An image of 11 tokens, 9 of them for the second expert; counts how often it is embedded."""

    def __init__(self):
        self.embedded = 0

    async def embed(self):
        self.embedded += 1
        return IMAGE


def prompt(picture, question=QUESTION):
    """Text, image, text; the image takes one position."""
    first, second = len(TEXT), len(TEXT) + 1
    return [
        PromptSpan(TEXT, range(first)),
        PromptSpan(media_content(b"image", 11), [first] * 11, picture.embed, lead=9),
        PromptSpan(question, range(second, second + len(question))),
    ]


async def answer(lm, spans, usage):
    with lm.open_cache() as kv:
        await prefill(lm, kv, spans, usage)
        kv.offset = 1 - 11
        return [token async for token in lm.generate(kv, [7], GREEDY)]


def plain_answer(question=QUESTION):
    context, first = GrowingContext(), len(TEXT)
    NETWORK(torch.tensor(TEXT), torch.arange(first), context)
    context.causal = False
    NETWORK(IMAGE, torch.full((11,), first), context, 9)
    context.causal, position, tokens = True, first + 1, []
    step = [*question, 7]
    for _ in range(GREEDY.max_tokens):
        where = torch.arange(position, position + len(step))
        hidden = NETWORK(torch.tensor(step), where, context)
        position += len(step)
        step = [NETWORK.logits(hidden[-1:]).argmax().item()]
        tokens += step
    return tokens


def test_generation_goes_on_after_an_image_that_takes_one_position():
    for budget in (4, 512):
        lm, runtime = two_experts(token_budget=budget)
        usage = Usage()
        (found,) = results(answer(lm, prompt(Picture()), usage), runtime=runtime)
        assert found == plain_answer()
        assert (usage.prompt_tokens, usage.cached_tokens) == (34, 0)


def test_the_same_prompt_again_computes_only_what_is_left_of_its_last_page():
    lm, runtime = two_experts()
    picture = Picture()
    for cached in (0, 32):
        usage = Usage()
        (found,) = results(answer(lm, prompt(picture), usage), runtime=runtime)
        assert found == plain_answer()
        assert usage.cached_tokens == cached
    assert picture.embedded == 1


def test_another_question_about_the_same_image_reuses_the_image():
    lm, runtime = two_experts(token_budget=5)
    picture = Picture()
    for seed, cached in ((1, 0), (2, 21), (3, 21)):
        question, usage = prompt_of(6, seed), Usage()
        (found,) = results(answer(lm, prompt(picture, question), usage), runtime=runtime)
        assert found == plain_answer(question)
        assert usage.cached_tokens == cached
    assert picture.embedded == 1
    assert lm.pool.table.used == 0
