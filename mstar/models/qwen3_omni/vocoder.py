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
        x = self.transform(self.embed(codes), streams)
        skip = len(streams[0].rows)
        if skip:
            x = torch.cat([torch.stack([stream.rows for stream in streams]), x], 1)
        wave = self.synthesis(x, skip)
        for stream, rows in zip(streams, x[:, -self.synthesis.context :], strict=True):
            stream.rows = rows
            stream.frames += codes.shape[2]
        return wave

    def transform(self, x: Tensor, streams: Sequence[VocoderStream] | None = None) -> Tensor:
        """The transformer's output `[batch, frames, hidden]`.

        Args:
            x: mean embeddings, like it.
            streams: what came before each row of the batch; their keys and values are changed.
        """
        count, window, eps = x.shape[1], self.config.sliding_window, self.config.rms_norm_eps
        before = 0 if streams is None else window - 1  # keys and values, though not all are there
        first = torch.tensor([0] if streams is None else [s.frames for s in streams])
        first = first.to(x.device)[:, None]
        places = first + torch.arange(count, device=x.device)
        keyed = first + torch.arange(-before, count, device=x.device)
        back = places[:, :, None] - keyed[:, None]
        seen = ((back >= 0) & (back < window) & (keyed >= 0)[:, None])[:, None]
        angles = self.rotary.angles(places.expand(len(x), -1).flatten())
        if streams is not None:
            old_keys, old_values = (
                torch.stack([getattr(stream, name) for stream in streams], 1)
                for name in ("keys", "values")
            )
        for index, layer in enumerate(self.pre_transformer.layers):
            own = layer.self_attn
            h = rms_norm(x, layer.input_layernorm.weight, eps)
            q, k, v = linear(h, own.qkv_proj.weight).unflatten(-1, (3, own.heads, -1)).unbind(2)
            q, k = (rotate(t.flatten(0, 1), *angles).view(q.shape) for t in (q, k))
            if streams is not None:
                k, v = torch.cat([old_keys[index], k], 1), torch.cat([old_values[index], v], 1)
                for stream, keys, values in zip(streams, k, v, strict=True):
                    stream.keys[index], stream.values[index] = keys[count:], values[count:]
            heads = (t.transpose(1, 2) for t in (q, k, v))
            h = F.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2).flatten(2)
            x = torch.addcmul(x, linear(h, own.o_proj.weight), layer.self_attn_layer_scale.scale)
            h = layer.mlp(rms_norm(x, layer.post_attention_layernorm.weight, eps))
            x = torch.addcmul(x, h, layer.mlp_layer_scale.scale)
        return rms_norm(x, self.pre_transformer.norm.weight, eps)
