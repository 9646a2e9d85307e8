"""The audio encoder: mel spectrogram -> rows for the Thinker (arXiv 2509.17765, section 2.2).

Chunks of a second are shrunk by three convolutions to 12.5 (13) tokens a second, and attend within
windows of some chunks. What a clip gives does not depend on the clips beside it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.layers.linear import apply
from mstar.engine.layers.packed import packed_attention
from mstar.engine.layers.residual import normed
from mstar.engine.weights import Source
from mstar.models.qwen3_omni.decoder import apart
from mstar.models.qwen3_omni.sizes import AudioConfig

__all__ = ["AudioEncoder"]


class _Attention(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        size = config.d_model
        self.heads = config.encoder_attention_heads
        self.qkv_proj = nn.Linear(size, 3 * size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        q, k, v = apply(self.qkv_proj, x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return apply(self.out_proj, packed_attention(q, k, v, lengths).flatten(1))


class _Layer(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        size, inner = config.d_model, config.encoder_ffn_dim
        self.self_attn_layer_norm = nn.LayerNorm(size)
        self.self_attn = _Attention(config)
        self.final_layer_norm = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, inner)
        self.fc2 = nn.Linear(inner, size)

    def forward(
        self, x: Tensor, added: Tensor | None, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """What leaves is the residual stream and what is still to be added to it; what comes too,
        so that a norm takes the addition along."""
        h, x = normed(self.self_attn_layer_norm, x, added)
        h, x = normed(self.final_layer_norm, self.self_attn(h, lengths), x)
        return x, apply(self.fc2, F.gelu(apply(self.fc1, h)))


class AudioEncoder(nn.Module):
    """Mel features -> rows `[tokens, output_dim]`."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        width, size = config.downsample_hidden_size, config.d_model
        self.conv2d1 = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.conv2d2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.conv2d3 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.conv_out = nn.Linear(width * config.bands, size, bias=False)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.encoder_layers))
        self.ln_post = nn.LayerNorm(size)
        self.proj1 = nn.Linear(size, size)
        self.proj2 = nn.Linear(size, config.output_dim)
        with torch.device("cpu"):
            places = _sinusoids(config.chunk_tokens, size)
        self.register_buffer("places", places, persistent=False)

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint."""
        return apart(name)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:
        """Encode clips.

        Args:
            features: `[mel bands, frames]`, those of one clip after those of the other.
            lengths: frames of each clip.

        Returns:
            Rows `[tokens, output_dim]`; `config.tokens(frames)` of each clip.

        Raises:
            ValueError: the lengths are not those of the features.
        """
        if sum(lengths) != features.shape[1] or min(lengths, default=0) < 1:
            raise ValueError(f"{features.shape[1]} frames, and clips of {list(lengths)}")
        x = self._shrunk(features.to(self.conv_out.weight.dtype), lengths)
        windows: list[int] = []
        for frames in lengths:
            whole, rest = divmod(self.config.tokens(frames), self.config.window)
            windows += [self.config.window] * whole + [rest] * (rest > 0)
        added = None
        for layer in self.layers:
            x, added = layer(x, added, windows)
        x = F.gelu(apply(self.proj1, normed(self.ln_post, x, added)[0]))
        return apply(self.proj2, x)

    def _shrunk(self, features: Tensor, lengths: Sequence[int]) -> Tensor:
        """Tokens `[tokens, d_model]` of all clips, with their positions."""
        chunk, size = self.config.chunk, self.config.d_model
        # The last chunk of a clip is padded to the others of its clip; a clip of one is not padded.
        pieces: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        counts: list[int] = []
        for clip in features.split(list(lengths), 1):
            width = min(chunk, clip.shape[1])
            for part in clip.split(chunk, 1):
                padded = F.pad(part, (0, width - part.shape[1]))
                pieces[width].append((len(counts), padded))
                counts.append(self.config.tokens(part.shape[1]))
        total = sum(counts)
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        out = features.new_empty(total, size)
        for group in pieces.values():
            x = self._convolved(torch.stack([part for _, part in group]))
            for (index, _), rows in zip(group, x, strict=True):
                out[starts[index] : starts[index + 1]] = rows[: counts[index]]
        return out

    def _convolved(self, x: Tensor) -> Tensor:
        """Tokens `[chunks, tokens, d_model]` of chunks `[chunks, mel bands, frames]`."""
        x = x.unsqueeze(1)
        for conv in (self.conv2d1, self.conv2d2, self.conv2d3):
            x = F.gelu(conv(x))
        x = apply(self.conv_out, x.permute(0, 3, 1, 2).flatten(2))
        return x + self.places[: x.shape[1]].to(x.dtype)


def _sinusoids(count: int, size: int) -> Tensor:
    """Positions `[count, size]` (Whisper, arXiv 2212.04356, section 2.2)."""
    half = size // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half).float())
    angle = torch.arange(count).float().unsqueeze(1) * rates
    return torch.cat([angle.sin(), angle.cos()], 1)
