"""The vocoder (code2wav): frames of codes -> waveform at 24 kHz (arXiv 2509.17765, section 2.4).

A transformer with a window of some seconds, then convolutions that look back only, but for the last
`tail` samples of a frame, which need the next one. So sound can be made as codes come, and
`VocoderStream` gives the very samples that one decoding of all codes gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.kernels.rms_norm import rms_norm
from mstar.engine.kernels.staging import to_device
from mstar.engine.layers.linear import linear
from mstar.engine.layers.mlp import GatedMLP
from mstar.engine.layers.rotary import Rotary, rotate
from mstar.engine.layers.weight import Weight
from mstar.engine.weights import Source
from mstar.models.qwen3_omni.decoder import apart
from mstar.models.qwen3_omni.sizes import VocoderConfig
from mstar.models.qwen3_omni.synthesis import Synthesis

__all__ = ["SAMPLE_RATE", "Vocoder", "VocoderStream"]

SAMPLE_RATE = 24000


class VocoderStream:
    """What has to be remembered of a clip whose codes come in chunks.

    Attributes:
        frames: how many have come.
        keys, values: of the frames before, `[layers, window - 1, heads, head_dim]`; the last ones
            are there.
        rows: the transformer's output for the last frames, as far as they can still be heard,
            `[frames, hidden]`.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor) -> None:
        self.frames = 0
        self.keys, self.values, self.rows = keys, values, rows


class _Attention(nn.Module):
    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)


class _Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(size))


class _Layer(nn.Module):
    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.input_layernorm = Weight(size)
        self.self_attn = _Attention(config)
        self.self_attn_layer_scale = _Scale(size)
        self.post_attention_layernorm = Weight(size)
        self.mlp = GatedMLP(size, config.intermediate_size)
        self.mlp_layer_scale = _Scale(size)


class _Transformer(nn.Module):
    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Vocoder(nn.Module):
    """Codes -> waveform."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.code_embedding = Weight(
            config.num_quantizers * config.codebook_size, config.hidden_size
        )
        self.pre_transformer = _Transformer(config)
        self.synthesis = Synthesis(config)
        self.rotary = Rotary(config.hidden_size // config.num_attention_heads, config.rope_theta)

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint."""
        if name.startswith("synthesis."):
            return self.synthesis.sources(name.removeprefix("synthesis."))
        return apart(name)

    def embed(self, codes: Tensor) -> Tensor:
        """Mean embeddings `[batch, frames, hidden]` of codes `[batch, groups, frames]`."""
        groups, size = codes.shape[1], self.config.codebook_size
        offsets = torch.arange(groups, device=codes.device)[:, None] * size
        return F.embedding(codes + offsets, self.code_embedding.weight).mean(1)

    def forward(self, codes: Tensor) -> Tensor:
        """Samples float32 `[batch, frames * frame_samples - tail]` of whole clips.

        Args:
            codes: integers `[batch, groups, frames]`.
        """
        return self.synthesis(self.transform(self.embed(codes)))

    def stream(self) -> VocoderStream:
        """An empty stream."""
        config, weight = self.config, self.code_embedding.weight
        heads = config.num_attention_heads
        shape = (
            config.num_hidden_layers,
            config.sliding_window - 1,
            heads,
            config.hidden_size // heads,
        )
        rows = weight.new_empty(0, config.hidden_size)
        return VocoderStream(weight.new_zeros(shape), weight.new_zeros(shape), rows)

    def extend(self, codes: Tensor, streams: Sequence[VocoderStream]) -> Tensor:
        """The samples float32 `[batch, samples]` that more codes make certain: all but the last
        `tail` of what has come.

        Args:
            codes: integers `[batch, groups, frames]`.
            streams: of each row, with equally many `rows`. They are changed.
        """
        wave, *after = self.advance(codes, *self.states(streams))
        self.proceed(streams, codes.shape[2], after)
        return wave

    def states(self, streams: Sequence[VocoderStream]) -> tuple[Tensor, ...]:
        """What `advance` has to know of streams: frames so far int64 `[batch]`, keys, values and
        rows, each `[batch, ...]`."""
        weight = self.code_embedding.weight
        frames = to_device([stream.frames for stream in streams], torch.int64, weight.device)
        names = ("keys", "values", "rows")
        return frames, *(torch.stack([getattr(s, name) for s in streams]) for name in names)

    def advance(
        self, codes: Tensor, frames: Tensor, keys: Tensor, values: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`extend`, as a function of tensors: samples, and the next keys, values and rows."""
        x, keys, values = self._transform(self.embed(codes), frames, keys, values)
        skip = rows.shape[1]
        if skip:
            x = torch.cat([rows, x], 1)
        return self.synthesis(x, skip), keys, values, x[:, -self.synthesis.context :]

    def proceed(
        self, streams: Sequence[VocoderStream], frames: int, after: Sequence[Tensor]
    ) -> None:
        """Streams have got so many frames more; `after` is what `advance` made of their states."""
        for stream, keys, values, rows in zip(streams, *after, strict=True):
            stream.frames += frames
            stream.keys.copy_(keys)
            stream.values.copy_(values)
            stream.rows = rows.clone()

    def transform(self, x: Tensor) -> Tensor:
        """The transformer's output `[batch, frames, hidden]` for mean embeddings like it."""
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return self._transform(x, first)[0]

    def _transform(
        self, x: Tensor, first: Tensor, keys: Tensor | None = None, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output, and the keys and values after it where there were some before.

        Args:
            first: places of the first frames, `[batch]`.
            keys, values: before them, `[batch, layers, window - 1, heads, head_dim]`.
        """
        count, window, eps = x.shape[1], self.config.sliding_window, self.config.rms_norm_eps
        before = 0 if keys is None else window - 1  # though not all are there
        places = first[:, None] + torch.arange(count, device=x.device)
        keyed = first[:, None] + torch.arange(-before, count, device=x.device)
        back = places[:, :, None] - keyed[:, None]
        seen = ((back >= 0) & (back < window) & (keyed >= 0)[:, None])[:, None]
        angles = self.rotary.angles(places.flatten())
        kept: list[tuple[Tensor, Tensor]] = []
        for index, layer in enumerate(self.pre_transformer.layers):
            own = layer.self_attn
            h = rms_norm(x, layer.input_layernorm.weight, eps)
            q, k, v = linear(h, own.qkv_proj.weight).unflatten(-1, (3, own.heads, -1)).unbind(2)
            q, k = (rotate(t.flatten(0, 1), *angles).view(q.shape) for t in (q, k))
            if keys is not None:
                k, v = torch.cat([keys[:, index], k], 1), torch.cat([values[:, index], v], 1)
                kept.append((k[:, count:], v[:, count:]))
            heads = (t.transpose(1, 2) for t in (q, k, v))
            h = F.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2).flatten(2)
            x = torch.addcmul(x, linear(h, own.o_proj.weight), layer.self_attn_layer_scale.scale)
            h = layer.mlp(rms_norm(x, layer.post_attention_layernorm.weight, eps))
            x = torch.addcmul(x, h, layer.mlp_layer_scale.scale)
        x = rms_norm(x, self.pre_transformer.norm.weight, eps)
        if keys is None:
            return x, None, None
        keys, values = (torch.stack(parts, 1) for parts in zip(*kept, strict=True))
        return x, keys, values
