"""The code predictor: the first code of a frame -> the others, one after the other.

Every frame is a short sequence of its own: the Talker's hidden state, the first code, the second,
and so on. Frames of many sequences run side by side; nothing here depends on values, so that a
whole frame can be captured as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.kernels.rotary_store import paired_angles, rotary_store
from mstar.engine.layers.attention import Projected
from mstar.engine.layers.linear import linear
from mstar.engine.weights import Source
from mstar.models.qwen3_omni.decoder import Decoder
from mstar.models.qwen3_omni.sizes import DecoderConfig

__all__ = ["CodePredictor", "Sequences"]


class CodePredictor(nn.Module):
    """A decoder with an embedding table and a head for every code but the first.

    Args:
        groups: codes of a frame.
    """

    def __init__(self, config: DecoderConfig, groups: int) -> None:
        super().__init__()
        self.config = config
        shape = groups - 1, config.vocab_size, config.hidden_size
        self.codec_embedding = nn.Parameter(torch.empty(shape))
        self.decoder = Decoder(config)
        self.lm_head = nn.Parameter(torch.empty(shape))
        self._sequences: dict[int, Sequences] = {}

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint, in which tables and heads are apart."""
        groups = range(len(self.lm_head))
        if name == "codec_embedding":
            return (Source(tuple(f"model.codec_embedding.{k}.weight" for k in groups)),)
        if name == "lm_head":
            return (Source(tuple(f"lm_head.{k}.weight" for k in groups)),)
        raise KeyError(name)

    def embedded(self, codes: Tensor) -> Tensor:
        """The sum `[frames, hidden]` of the embeddings of codes `[frames, groups - 1]`."""
        offsets = torch.arange(codes.shape[1], device=codes.device) * self.config.vocab_size
        return F.embedding(codes + offsets, self.codec_embedding.flatten(0, 1)).sum(1)

    def forward(
        self,
        hidden: Tensor,
        first: Tensor,
        choose: Callable[[Tensor], Tensor],
        *,
        keep: list[Tensor] | None = None,
    ) -> Tensor:
        """The other codes of frames.

        Args:
            hidden: the Talker's normed hidden states from which the first codes came, `[frames,
                hidden]`.
            first: the Talker's embeddings of the first codes, like them.
            choose: scores float32 `[frames, vocab]` -> codes `[frames]`. Called once for each code.
            keep: a list to which the scores are appended.

        Returns:
            Codes int64 `[frames, groups - 1]`.
        """
        count, (heads, tables) = len(hidden), self._tables
        size = 1 << (count - 1).bit_length()
        if size not in self._sequences:
            self._sequences[size] = Sequences(self.decoder, size, len(heads) + 1, hidden)
        sequences = self._sequences[size].begin(count)
        x = sequences.extend(torch.stack([hidden, first], 1).flatten(0, 1))[1::2]
        codes: list[Tensor] = []
        for k, head in enumerate(heads):
            if k:
                x = sequences.extend(F.embedding(codes[-1], tables[k - 1]))
            scores = linear(x, head).float()
            if keep is not None:
                keep.append(scores)
            codes.append(choose(scores))
        return torch.stack(codes, 1)

    @cached_property
    def _tables(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The head and the embeddings of every code."""
        return self.lm_head.unbind(), self.codec_embedding.unbind()


class Sequences:
    """Sequences that grow together, with room for a known length: an `AttentionContext`.

    Args:
        size: most sequences.
        length: most tokens of each.
        like: of which dtype and device keys and values are.
    """

    def __init__(self, decoder: Decoder, size: int, length: int, like: Tensor) -> None:
        layout = decoder.kv_layout
        self.decoder = decoder
        self.count = size
        self.length = 0
        shape = layout.layers, size, length, layout.kv_heads, layout.head_dim
        self._keys, self._values = like.new_empty(shape), like.new_empty(shape)
        self._plans: dict[int, list[_Step]] = {}

    def begin(self, count: int) -> Sequences:
        """Forget all, and go on with `count` empty sequences."""
        self.count, self.length = count, 0
        if count not in self._plans:
            self._plans[count] = self._planned(count)
        return self

    def extend(self, x: Tensor) -> Tensor:
        """Normed hidden states `[count * new, hidden]` of new tokens of every sequence: two at
        first, and then one at a time."""
        self._step = self._plans[self.count][max(self.length - 1, 0)]
        self.length += x.shape[0] // self.count
        return self.decoder(x, context=self, angles=self._step.angles)[0]

    def attend(
        self,
        layer: int,
        parts: Sequence[Projected],
        angles: tuple[Tensor, Tensor],
        heads: int,
        kv_heads: int,
    ) -> Tensor:
        """See `AttentionContext.attend`."""
        ((qkv, norms),) = parts
        pages, step, count = (self._keys[layer], self._values[layer]), self._step, self.count
        q = rotary_store(qkv, *angles, *pages, step.slots, heads, kv_heads, norms)
        (tokens, _, dim), (k, v) = q.shape, step.seen[layer]
        if tokens == count:  # the heads of a group take the place of tokens
            q = q.view(count, kv_heads, -1, dim)
            return F.scaled_dot_product_attention(q, k, v).reshape(count, heads * dim)
        q = q.unflatten(0, (count, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def _planned(self, count: int) -> list[_Step]:
        """Of the first two tokens, of the third, ..."""
        length, device = self._keys.shape[2], self._keys.device
        places = torch.arange(length, device=device).expand(count, -1)
        slots = places + torch.arange(count, device=device)[:, None] * length
        layers = list(zip(self._keys[:, :count], self._values[:, :count], strict=True))
        return [
            _Step(
                slots[:, rows].flatten().contiguous(),  # a kernel reads them as they lie
                paired_angles(*self.decoder.rotary.angles(places[:, rows].flatten())),
                [tuple(x[:, : rows.stop].transpose(1, 2) for x in layer) for layer in layers],
            )
            for rows in (slice(0, 2), *(slice(k, k + 1) for k in range(2, length)))
        ]


class _Step(NamedTuple):
    """What is the same whenever so many sequences get tokens of one place.

    Attributes:
        slots: of the new tokens `[count * new]`.
        angles: theirs.
        seen: of each layer, keys and values up to here, `[count, kv_heads, length, head_dim]`.
    """

    slots: Tensor
    angles: tuple[Tensor, Tensor]
    seen: list[tuple[Tensor, Tensor]]
