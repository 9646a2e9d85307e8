"""A Llama that is small enough to run hundreds of requests in a second."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from walks import results

from mstar.engine.kvcache import KVPool
from mstar.engine.lm import LanguageModel
from mstar.engine.runtime import Runtime
from mstar.engine.sampling import SamplingParams
from mstar.models.orpheus.llama import Llama, LlamaConfig
from mstar.types import Usage

CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=40,
)


def network(config: LlamaConfig = CONFIG, seed: int = 0) -> Llama:
    """A Llama with random weights that are large enough for lively tokens."""
    torch.manual_seed(seed)
    llama = Llama(config)
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=2 / math.sqrt(config.hidden_size))
    return llama.eval().requires_grad_(False)


NETWORK = network()


def prompt_of(length, seed=0):
    """Random token ids."""
    return np.random.default_rng(seed).integers(CONFIG.vocab_size, size=length).tolist()


def language_model(pages=256, page_size=4, prefix_cache=True, model=NETWORK, **options):
    """A language model over a pool of its own, and a runtime it is bound to."""
    pool = KVPool(
        model.kv_layout, pages * page_size, page_size=page_size, prefix_cache=prefix_cache
    )
    lm = LanguageModel("lm", model, pool, **options)
    runtime = Runtime()
    lm.bind(runtime.schedule)
    return lm, runtime


async def decode(lm, prompt, params, usage=None):
    """All tokens of one generation, and why it ended."""
    with lm.open_cache() as kv:
        generation = lm.generate(kv, prompt, params, usage=usage)
        return [token async for token in generation], generation.finish_reason


def alone(prompt, params, **options):
    """What a request gives when nothing else is there."""
    lm, runtime = language_model(**options)
    (result,) = results(decode(lm, prompt, params, Usage()), runtime=runtime)
    return result


GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
