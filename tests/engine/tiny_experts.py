"""A network of two experts, small enough to run many batches in a second."""

from __future__ import annotations

import torch
from tiny_lm import CONFIG, network
from torch import nn

from mstar.engine.kvcache import KVPool
from mstar.engine.layers.attention import HeadNorms, Projected
from mstar.engine.lm import LanguageModel
from mstar.engine.runtime import Runtime


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
        streams = [
            (self.experts[1], self.norms[1], x[:lead]),
            (self.experts[0], self.norms[0], x[lead:]),
        ]
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
    """A language model over such a network, and a runtime it is bound to."""
    pool = KVPool(NETWORK.kv_layout, pages * 4, page_size=4)
    lm = LanguageModel("lm", NETWORK, pool, **options)
    runtime = Runtime()
    lm.bind(runtime.schedule)
    return lm, runtime


def embeddings(count, seed):
    """Random embeddings `[count, hidden]`."""
    return torch.randn(count, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))
