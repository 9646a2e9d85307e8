"""Scores of the chosen tokens are those of the network, whatever the sampler does to them."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny_lm import GREEDY, NETWORK, language_model, prompt_of
from walks import results

PARAMS = replace(GREEDY, logprobs=3, repetition_penalty=1.5, temperature=0.7, seed=3)


async def scored(lm, prompt, params):
    with lm.open_cache() as kv:
        generation = lm.generate(kv, prompt, params)
        tokens = [token async for token in generation]
        return tokens, generation.scores


def test_scores_are_the_logs_of_the_plain_networks_probabilities():
    lm, runtime = language_model()
    prompts = [prompt_of(9), prompt_of(4, 1), prompt_of(6, 2)]
    wanted = [PARAMS, replace(PARAMS, logprobs=0), replace(PARAMS, logprobs=None)]
    walks = [scored(lm, prompt, params) for prompt, params in zip(prompts, wanted, strict=True)]
    found = results(*walks, runtime=runtime)
    for prompt, params, (tokens, scores) in zip(prompts, wanted, found, strict=True):
        assert len(scores) == (0 if params.logprobs is None else len(tokens))
        logits = NETWORK.logits(NETWORK(torch.tensor([*prompt, *tokens])))
        logs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        for token, score, row in zip(tokens, scores, logs, strict=False):
            assert score.token == token
            assert abs(score.logprob - row[token].item()) < 1e-4
            values, ids = row.topk(params.logprobs)
            assert [i for i, _ in score.top] == ids.tolist()
            torch.testing.assert_close(
                torch.tensor([v for _, v in score.top]), values, atol=1e-4, rtol=0
            )


def test_asking_for_scores_changes_no_token():
    for params in (PARAMS, GREEDY):
        lm, runtime = language_model()
        plain, more = results(
            scored(lm, prompt_of(8), replace(params, logprobs=None)),
            scored(lm, prompt_of(8), replace(params, logprobs=40)),
            runtime=runtime,
        )
        assert plain[0] == more[0]
