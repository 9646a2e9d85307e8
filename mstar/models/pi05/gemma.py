"""The two Gemmas of pi0.5 (Gemma Team 2024; Black et al., pi0, arXiv 2410.24164, section IV).

The prefix reads images and text once. The action expert has a layer for each of the prefix's; it
attends to that layer's keys and values and to its own. Its norms are modulated by the timestep
(adaRMS): scale, shift and gate come from outside, see `timestep.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mstar.engine.kernels.ada_norm import ada_norm
from mstar.engine.kernels.gated import gelu_tanh_mul
from mstar.engine.kernels.rotary_store import rotary_store
from mstar.engine.layers.linear import linear
from mstar.engine.layers.rotary import Rotary
from mstar.engine.layers.weight import Weight
from mstar.engine.weights import Source
from mstar.models.pi05.attention import KeysValues, attend
from mstar.models.pi05.sizes import GemmaSizes

__all__ = ["Expert", "Prefix"]

_EPS = 1e-6
_ALIGNED = 16  # rows: a mask of so many is read by a GPU as it is, others are copied in every layer
_THETA = 10000.0


class _Product(Weight):
    """A matrix that its inputs are multiplied with."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class _Layer(nn.Module):
    """What layers of both have. Queries, keys and values are one product; gate and up, too.

    Args:
        whole: False for a layer that is asked for keys and values only.
    """

    def __init__(self, sizes: GemmaSizes, whole: bool = True) -> None:
        super().__init__()
        self.sizes = sizes
        width, rows = sizes.width, sizes.num_heads * sizes.head_dim
        self.kv_rows = 2 * sizes.num_kv_heads * sizes.head_dim
        self.qkv_proj = _Product(self.kv_rows + rows * whole, width)
        if whole:
            self.o_proj = _Product(width, rows)
            self.gate_up_proj = _Product(2 * sizes.mlp_dim, width)
            self.down_proj = _Product(width, sizes.mlp_dim)

    def project(
        self, h: Tensor, angles: tuple[Tensor, Tensor], kv: Tensor, slots: Tensor
    ) -> Tensor:
        """Rotated queries `[batch, tokens, heads, head_dim]`, none of a layer that is not whole;
        keys and values go to their slots, see `KeysValues`."""
        qkv, kv_heads = self.qkv_proj(h).flatten(0, 1), self.sizes.num_kv_heads
        heads = qkv.shape[1] // self.sizes.head_dim - 2 * kv_heads
        pages = kv.flatten(1, 2).unsqueeze(2)  # of one slot each
        return rotary_store(qkv, *angles, *pages, slots, heads, kv_heads).unflatten(0, h.shape[:2])

    def mlp(self, h: Tensor) -> Tensor:
        """The gated MLP."""
        return self.down_proj(gelu_tanh_mul(self.gate_up_proj(h)))

    @staticmethod
    def sources(layer: str, path: str) -> Source:
        """Where parameter `path` of a layer is; projections that we run as one are apart."""
        module = path.split(".")[0]
        if module in ("qkv_proj", "o_proj"):
            parts = ("q_proj", "k_proj", "v_proj") if module == "qkv_proj" else (module,)
            return Source(tuple(f"{layer}self_attn.{part}.weight" for part in parts))
        if module in ("gate_up_proj", "down_proj"):
            parts = ("gate_proj", "up_proj") if module == "gate_up_proj" else (module,)
            return Source(tuple(f"{layer}mlp.{part}.weight" for part in parts))
        return _norm(layer + path)


class _PrefixLayer(_Layer):
    def __init__(self, sizes: GemmaSizes, whole: bool) -> None:
        super().__init__(sizes, whole)
        self.input_layernorm = Weight(sizes.width)
        if whole:
            self.post_attention_layernorm = Weight(sizes.width)


class Prefix(nn.Module):
    """The Gemma that reads images and text.

    Args:
        whole: False leaves out what only the last layer's output needs, which nothing reads: of
            that layer, the norm and the projections to keys and values are enough.
    """

    def __init__(self, sizes: GemmaSizes, *, whole: bool = False) -> None:
        super().__init__()
        self.sizes = sizes
        last = sizes.depth - 1
        self.layers = nn.ModuleList(
            _PrefixLayer(sizes, whole or index < last) for index in range(sizes.depth)
        )
        self.norm = Weight(sizes.width) if whole else None
        self.rotary = Rotary(sizes.head_dim, _THETA)

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint."""
        if name == "norm.weight":
            return (_norm(name),)
        layers, index, path = name.split(".", 2)
        found = _Layer.sources(f"{layers}.{index}.", path)
        if path.startswith("qkv_proj") and not hasattr(self.layers[int(index)], "o_proj"):
            found = Source(found.names[1:])
        return (found,)

    def forward(self, tokens: Tensor, horizon: int, lengths: Tensor | None = None) -> KeysValues:
        """Read valid tokens, packed at the front, and leave room for the expert's.

        Args:
            tokens: `[batch, room, width]`.
            horizon: actions in a chunk.
            lengths: how many of each sample's tokens are valid, int `[batch]`; None for all.
        """
        batch, room = tokens.shape[:2]
        rows = room + horizon
        if lengths is not None:
            rows += -rows % _ALIGNED
        places = torch.arange(rows, device=tokens.device)
        sizes = self.sizes
        shape = sizes.depth, 2, batch, rows, sizes.num_kv_heads, sizes.head_dim
        if lengths is None:
            prefix = None
            kv = KeysValues(tokens.new_empty(shape), places[room:].expand(batch, -1))
        else:
            ends = lengths.unsqueeze(1)
            prefix = _seen(places[:room] < ends, tokens.dtype)
            seen = _seen(places < ends + horizon, tokens.dtype)
            # Zeros, since what is not seen must be finite.
            kv = KeysValues(tokens.new_zeros(shape), places[:horizon] + ends, seen)
        angles = self.rotary.angles(places[:room].repeat(batch))
        slots = kv.slots(places[:room].expand(batch, -1))
        x, added = tokens, None
        one = self.layers[0].input_layernorm.weight.new_ones(1, 1, self.sizes.width)
        zero = torch.zeros_like(one)

        def norm(module: Weight) -> tuple[Tensor, Tensor]:
            return ada_norm(x, module.weight.view(1, 1, -1), zero, _EPS, added, one)

        for layer, both in zip(self.layers, kv.layers, strict=True):
            h, x = norm(layer.input_layernorm)
            q = layer.project(h, angles, both, slots)
            if layer is self.layers[-1]:
                break
            added = layer.o_proj(attend(q, both[:, :, :room], prefix))
            h, x = norm(layer.post_attention_layernorm)
            added = layer.mlp(h)
        return kv


class Expert(nn.Module):
    """The Gemma that acts."""

    def __init__(self, sizes: GemmaSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.layers = nn.ModuleList(_Layer(sizes) for _ in range(sizes.depth))
        self.rotary = Rotary(sizes.head_dim, _THETA)

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint."""
        layers, index, path = name.split(".", 2)
        return (_Layer.sources(f"{layers}.{index}.", path),)

    def places(self, kv: KeysValues) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Angles and slots of the tokens of a chunk; the same in every step."""
        return self.rotary.angles(kv.positions.flatten()), kv.slots(kv.positions)

    def forward(
        self,
        x: Tensor,
        kv: KeysValues,
        places: tuple[tuple[Tensor, Tensor], Tensor],
        modulation: Tensor,
    ) -> Tensor:
        """One pass; overwrites the rows of `kv` behind the prefix.

        Args:
            x: tokens of a chunk, `[batch, horizon, width]`.
            places: see `places`.
            modulation: float32 `[batch or 1, horizon or 1, norms, 3, width]`: 1 + scale, shift and
                gate of every norm.

        Returns:
            Normed hidden states `[batch, horizon, width]`.
        """
        angles, slots = places
        norms = [norm.unbind(2) for norm in modulation.unbind(2)]
        added = gate = None
        for index, layer in enumerate(self.layers):
            scale, shift, next_gate = norms[2 * index]
            h, x = ada_norm(x, scale, shift, _EPS, added, gate)
            q = layer.project(h, angles, kv.layers[index], slots)
            added, gate = layer.o_proj(attend(q, kv.layers[index], kv.seen)), next_gate
            scale, shift, next_gate = norms[2 * index + 1]
            h, x = ada_norm(x, scale, shift, _EPS, added, gate)
            added, gate = layer.mlp(h), next_gate
        scale, shift, _ = norms[-1]
        return ada_norm(x, scale, shift, _EPS, added, gate)[0]


def _seen(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores `[batch, heads, queries, keys]`, of which keys are valid."""
    return torch.zeros_like(valid, dtype=dtype).masked_fill_(~valid, -math.inf)[:, None, None]


def _norm(name: str) -> Source:
    """A norm's weight, which is stored as w for a factor of 1 + w."""
    return Source((name,), lambda found: found[0].float() + 1)
