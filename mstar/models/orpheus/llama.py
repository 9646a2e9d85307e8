"""The Llama decoder (Touvron et al. 2023) that Orpheus speaks with.

A plain network: without the engine, `Llama(config)(ids)` runs one sequence causally.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.kernels.gated import silu_mul
from mstar.engine.kernels.rms_norm import rms_norm
from mstar.engine.kvcache import KVLayout
from mstar.engine.layers.attention import AttentionContext, CausalContext, Projected
from mstar.engine.layers.linear import apply, linear
from mstar.engine.layers.rotary import Rotary
from mstar.engine.layers.weight import Weight
from mstar.engine.weights import Source
from mstar.models.fields import (
    check_fields,
    check_sizes,
    check_values,
    known,
    read_object,
    required,
)

__all__ = ["Llama", "LlamaConfig"]

_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class LlamaConfig:
    """The published config.json, as far as the network depends on it.

    Raises:
        ValueError: a value that no network can have.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 131072

    def __post_init__(self) -> None:
        check_fields(self)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads}: must divide the {heads} heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: must be even, for rotary embeddings")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a config.json, older (`rope_scaling`) or newer (`rope_parameters`).

        Raises:
            ValueError: it describes another kind of network, or none.
        """
        if config.get("model_type") != "llama":
            raise ValueError(f"model_type={config.get('model_type')!r}: must be 'llama'")
        check_values(config, hidden_act="silu")
        required(config, _NEEDED)
        check_sizes(config, _NEEDED)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_scaling={rope!r}: must be an object")
        rope = dict(rope)
        theta = rope.pop("rope_theta", config.get("rope_theta"))
        if rope and "max_position_embeddings" in config:
            rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
        values = {**known(cls, config), "rope_scaling": rope or None}
        heads = config["num_attention_heads"]
        values.setdefault("num_key_value_heads", heads)
        values.setdefault("head_dim", config["hidden_size"] // heads)
        if theta is not None:
            values["rope_theta"] = theta
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> LlamaConfig:
        """Read the config.json at `path`."""
        return cls.from_dict(read_object(path))


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = (self.heads + 2 * self.kv_heads) * config.head_dim
        bias = config.attention_bias
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=bias)
        self.o_proj = nn.Linear(self.heads * config.head_dim, config.hidden_size, bias=bias)


class _MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Linear(size, 2 * inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, size, bias=config.mlp_bias)


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = _MLP(config)


class _Body(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Llama(nn.Module):
    """The decoder with its output head. Parameters are named as in the published files."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling)

    @property
    def kv_layout(self) -> KVLayout:
        """What one token keeps in the cache."""
        config = self.config
        return KVLayout(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.config.vocab_size

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint: projections that we run as one are apart."""
        for fused, parts in _FUSED.items():
            if fused in name:
                return (Source(tuple(name.replace(fused, part) for part in parts)), Source((name,)))
        return (Source((name,)),)

    def embed(self, ids: Tensor) -> Tensor:
        """Embedding rows `[tokens, hidden]` of ids `[tokens]`."""
        return F.embedding(ids, self.model.embed_tokens.weight)

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        context: AttentionContext | None = None,
        *,
        keep: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the layers and the final norm.

        Args:
            inputs: ids int `[tokens]`, or embeddings `[tokens, hidden]`.
            positions: int `[tokens]`; counted from 0 if left out.
            context: where earlier keys and values are; none if left out.
            keep: a list to which the embeddings and every layer's output are appended.

        Returns:
            Normed hidden states `[tokens, hidden]`.
        """
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        if positions is None:
            positions = torch.arange(len(x), device=x.device)
        context = context or CausalContext()
        angles = self.rotary.angles(positions)
        eps = self.config.rms_norm_eps
        residual, h = x, rms_norm(x, self.model.layers[0].input_layernorm.weight, eps)
        for index, layer in enumerate(self.model.layers):
            if keep is not None:
                keep.append(residual)
            attention, mlp = layer.self_attn, layer.mlp
            qkv = apply(attention.qkv_proj, h)
            parts = (Projected(qkv),)
            h = context.attend(index, parts, angles, attention.heads, attention.kv_heads)
            h = apply(attention.o_proj, h)
            h, residual = rms_norm(h, layer.post_attention_layernorm.weight, eps, residual)
            h = apply(mlp.down_proj, silu_mul(apply(mlp.gate_up_proj, h)))
            h, residual = rms_norm(h, self._next_norm(index), eps, residual)
        return h

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores float32 `[tokens, vocab]` of normed hidden states `[tokens, hidden]`."""
        return linear(hidden, self.lm_head.weight).float()

    def _next_norm(self, index: int) -> Tensor:
        layers = self.model.layers
        last = index + 1 == len(layers)
        return self.model.norm.weight if last else layers[index + 1].input_layernorm.weight


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
