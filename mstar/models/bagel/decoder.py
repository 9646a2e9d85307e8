"""BAGEL's decoder: two experts, one attention (a Mixture of Transformers, Liang et al. 2024).

Every layer has two complete sets of weights, for tokens that are understood (`und`: text and what
the vision encoder saw) and for latents that are generated (`gen`). Both kinds attend to each other.

A plain network: without the engine, `Decoder(config)(ids)` runs one sequence causally.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.kernels.rms_norm import rms_norm
from mstar.engine.kvcache import KVLayout
from mstar.engine.layers.attention import AttentionContext, CausalContext, HeadNorms, Projected
from mstar.engine.layers.linear import apply, linear
from mstar.engine.layers.mlp import GatedMLP
from mstar.engine.layers.rotary import Rotary
from mstar.engine.layers.weight import Weight
from mstar.engine.weights import Source
from mstar.models.bagel.config import LLMConfig

__all__ = ["Decoder"]


class _Attention(nn.Module):
    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        heads, size = config.num_attention_heads, config.hidden_size
        rows = (heads + 2 * config.num_key_value_heads) * config.head_dim
        self.qkv_proj = nn.Linear(size, rows)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.q_norm = Weight(config.head_dim)
        self.k_norm = Weight(config.head_dim)


class _Stream:
    """The rows of one expert, `"und"` or `"gen"`, on their way through the layers: `residual` is
    `[rows, hidden]`."""

    def __init__(self, expert: str, residual: Tensor) -> None:
        self.expert = expert
        self.residual = residual
        self.added: Tensor | None = None  # to the residual stream, with the next norm

    def norm(self, weight: Tensor, eps: float) -> Tensor:
        if self.added is None:
            return rms_norm(self.residual, weight, eps)
        normed, self.residual = rms_norm(self.added, weight, eps, self.residual)
        self.added = None
        return normed

    def total(self) -> Tensor:
        """The residual stream with all that is added to it."""
        return self.residual if self.added is None else self.residual + self.added


class _Expert(nn.Module):
    """One set of weights of a layer."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def project(self, stream: _Stream) -> Projected:
        h = stream.norm(self.input_layernorm.weight, self.eps)
        return Projected(apply(self.self_attn.qkv_proj, h), self._norms)

    @cached_property
    def _norms(self) -> HeadNorms:
        own = self.self_attn
        return HeadNorms(own.q_norm.weight, own.k_norm.weight, self.eps)

    def finish(self, stream: _Stream, attended: Tensor) -> None:
        """The rest of the layer, after the attention."""
        stream.added = apply(self.self_attn.o_proj, attended)
        h = stream.norm(self.post_attention_layernorm.weight, self.eps)
        stream.added = self.mlp(h)


class _Layer(nn.Module):
    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.und = _Expert(config)
        self.gen = _Expert(config)


class _Body(nn.Module):
    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)
        self.norm_gen = Weight(config.hidden_size)


class Decoder(nn.Module):
    """The decoder with its output head."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config.head_dim, config.rope_theta)

    @property
    def kv_layout(self) -> KVLayout:
        config = self.config
        return KVLayout(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.config.vocab_size

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint: projections that we run as one are apart."""
        if name == "model.norm_gen.weight":
            return (Source(("model.norm_moe_gen.weight",)),)
        found = _OF_AN_EXPERT.fullmatch(name)
        if found is None:
            return (Source((name,)),)
        layer, expert, path, leaf = found.groups()
        *module, last = path.split(".")
        parts = [[*module, part] for part in _FUSED.get(last, (last,))]
        for part in parts if expert == "gen" else ():
            part[-1 if part[0] == "self_attn" else 0] += "_moe_gen"
        return (Source(tuple(layer + ".".join([*part, leaf]) for part in parts)),)

    def embed(self, ids: Tensor) -> Tensor:
        """Embedding rows `[tokens, hidden]` of ids `[tokens]`."""
        return F.embedding(ids, self.model.embed_tokens.weight)

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        context: AttentionContext | None = None,
        lead: int = 0,
        *,
        keep: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states `[tokens, hidden]`: the `lead` as the last layer leaves it (`norm_lead` is
        its final norm), the rest normed.

        Args:
            inputs: ids int `[tokens]`, or embeddings `[tokens, hidden]`.
            positions: int `[tokens]`; counted from 0 if left out.
            context: where earlier keys and values are; none if left out.
            lead: how many of the first tokens run through the `gen` expert.
            keep: a list to which the embeddings and every layer's output are appended.
        """
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        if positions is None:
            positions = torch.arange(len(x), device=x.device)
        context = context or CausalContext()
        angles = self.rotary.angles(positions)
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        streams = [_Stream("gen", x[:lead])] if lead else []
        if lead < len(x):
            streams.append(_Stream("und", x[lead:]))
        rows = [len(stream.residual) for stream in streams]
        for index, layer in enumerate(self.model.layers):
            if keep is not None:
                keep.append(_joined([stream.total() for stream in streams]))
            experts = [getattr(layer, stream.expert) for stream in streams]
            parts = [expert.project(s) for expert, s in zip(experts, streams, strict=True)]
            attended = context.attend(index, parts, angles, heads, kv_heads).split(rows)
            for expert, stream, mine in zip(experts, streams, attended, strict=True):
                expert.finish(stream, mine)
        if keep is not None:
            keep.append(_joined([stream.total() for stream in streams]))
        return _joined([self._final(stream) for stream in streams])

    def norm_lead(self, hidden: Tensor) -> Tensor:
        """The final norm of the `gen` expert, of hidden states `[..., hidden]` of a lead."""
        return rms_norm(hidden, self.model.norm_gen.weight, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores float32 `[tokens, vocab]` of normed hidden states `[tokens, hidden]`."""
        return linear(hidden, self.lm_head.weight).float()

    def _final(self, stream: _Stream) -> Tensor:
        if stream.expert == "gen":
            return stream.total()
        return stream.norm(self.model.norm.weight, self.config.rms_norm_eps)


_OF_AN_EXPERT = re.compile(r"(model\.layers\.\d+\.)(und|gen)\.(.+)\.(\w+)")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
