"""The decoder that Thinker, Talker and code predictor are: Qwen3 (arXiv 2505.09388, section 2).

Grouped-query attention, a norm of every query and key head, and an MLP that is a mixture of experts
or a plain one. A plain network: without the engine it runs one sequence causally.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mstar.engine.kernels.rms_norm import rms_norm
from mstar.engine.kvcache import KVLayout
from mstar.engine.layers.attention import AttentionContext, CausalContext, HeadNorms, Projected
from mstar.engine.layers.linear import linear
from mstar.engine.layers.mlp import GatedMLP
from mstar.engine.layers.moe import MoE
from mstar.engine.layers.weight import Weight
from mstar.engine.weights import Source
from mstar.models.qwen3_omni.mrope import MRotary
from mstar.models.qwen3_omni.sizes import DecoderConfig

__all__ = ["Decoder", "apart", "prefixed"]

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class _Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size, dim = config.hidden_size, config.head_dim
        self.qkv_proj = nn.Linear(size, (heads + 2 * kv_heads) * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, size, bias=False)
        self.q_norm = Weight(dim)
        self.k_norm = Weight(dim)


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = Weight(config.hidden_size)
        if config.num_experts:
            self.mlp: nn.Module = MoE(
                config.hidden_size,
                config.moe_intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                normalise=config.norm_topk_prob,
                shared=config.shared_expert_intermediate_size,
            )
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)


class Decoder(nn.Module):
    """The layers and the final norm, without embeddings and heads."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)
        self.rotary = MRotary(config.head_dim, config.rope_theta, config.mrope_section)

    @cached_property
    def _weights(self) -> list[tuple[Any, ...]]:
        """What `forward` needs of each layer: looking it up takes longer than a small product."""
        eps = self.config.rms_norm_eps
        return [
            (
                layer.input_layernorm.weight,
                own.qkv_proj.weight,
                HeadNorms(own.q_norm.weight, own.k_norm.weight, eps),
                own.o_proj.weight,
                layer.post_attention_layernorm.weight,
                layer.mlp.forward,
            )
            for layer in self.layers
            for own in (layer.self_attn,)
        ]

    @property
    def kv_layout(self) -> KVLayout:
        """What one token keeps in the cache."""
        config = self.config
        return KVLayout(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint."""
        if self.config.num_experts and ".mlp." in name:
            path, leaf = name.split(".mlp.")
            found = self.get_submodule(f"{path}.mlp").sources(leaf)
            return [prefixed(source, f"{path}.mlp.") for source in found]
        return apart(name)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        context: AttentionContext | None = None,
        *,
        angles: tuple[Tensor, Tensor] | None = None,
        extra: Sequence[Tensor] = (),
        tap: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layers and the final norm.

        Args:
            x: embeddings `[tokens, hidden]`.
            positions: `[tokens]` or `[3, tokens]`; counted from 0 if left out.
            context: where earlier keys and values are; none if left out.
            angles: those of the positions (see `MRotary.angles`), where they are known already.
            extra: added to what the first, second, ... layer gives, each `[tokens, hidden]`.
            tap: after how many layers the hidden states are to be returned as well.

        Returns:
            Normed hidden states and those of the tap, each `[tokens, hidden]`.
        """
        if angles is None:
            if positions is None:
                positions = torch.arange(len(x), device=x.device)
            angles = self.rotary.angles(positions)
        context = context or CausalContext()
        config, eps = self.config, self.config.rms_norm_eps
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        tapped = x if tap == 0 else None
        residual, added = x, None
        for index, (before, qkv, norms, out, after, mlp) in enumerate(self._weights):
            h, residual = _norm(residual, added, before, eps)
            parts = (Projected(linear(h, qkv), norms),)
            added = linear(context.attend(index, parts, angles, heads, kv_heads), out)
            h, residual = _norm(residual, added, after, eps)
            added = mlp(h)
            if index < len(extra):
                added = added + extra[index]
            if index + 1 == tap:
                tapped = residual + added
        return _norm(residual, added, self.norm.weight, eps)[0], tapped


def prefixed(source: Source, prefix: str) -> Source:
    """A source whose names have something before them."""
    return replace(source, names=tuple(prefix + name for name in source.names))


def apart(name: str) -> Sequence[Source]:
    """Where a parameter is in a checkpoint, in which what we run as one is apart."""
    for fused, parts in _FUSED.items():
        if fused in name:
            return (Source(tuple(name.replace(fused, part) for part in parts)),)
    return (Source((name,)),)


def _norm(
    residual: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Norm of the residual stream with what is added to it, and the stream."""
    if added is None:
        return rms_norm(residual, weight, eps), residual
    return rms_norm(added, weight, eps, residual)
