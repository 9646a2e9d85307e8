"""The action-conditioned predictor: what a camera will show after an action.

A frame is its action, its state and its patches, in this order, and sees itself and the frames
before it, so frame after frame with kept keys and values is the same as all at once.
(V-JEPA 2, arXiv 2506.09985, section 4.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.layers.linear import apply
from mstar.engine.weights import Source
from mstar.models.vjepa2.ac_cache import FrameCache
from mstar.models.vjepa2.ac_config import EXTRINSICS, AcConfig
from mstar.models.vjepa2.block import Block, attend
from mstar.models.vjepa2.rotary import Rotation, rotation

__all__ = ["AcPredictor", "Frames"]


@dataclass(frozen=True, eq=False)
class Frames:
    """The next frames of some samples. What is the same for all samples has 1 of them.

    Args:
        latents: `[samples or 1, frames, patches, embed_dim]`.
        actions, states: float32 `[samples or 1, frames, 7]`.
        extrinsics: float32 `[samples or 1, frames, 6]`, where the model has them.
        cache: of the frames before, which takes these in as well; None if there are none, and
            none will follow.
    """

    latents: Tensor
    actions: Tensor
    states: Tensor
    extrinsics: Tensor | None = None
    cache: FrameCache | None = None

    @property
    def samples(self) -> int:
        """Samples that come of them."""
        return max(len(self.latents), len(self.actions), len(self.states))

    @property
    def first(self) -> int:
        """Number of the first of these frames."""
        return 0 if self.cache is None else self.cache.frames

    @property
    def count(self) -> int:
        """Frames."""
        return self.latents.shape[1]


class AcPredictor(nn.Module):
    """Latents of frames, actions and states to latents of the frames after them."""

    def __init__(self, config: AcConfig) -> None:
        super().__init__()
        self.config = config
        width, numbers = config.pred_embed_dim, config.action_embed_dim
        self.predictor_embed = nn.Linear(config.embed_dim, width)
        self.action_encoder = nn.Linear(numbers, width)
        self.state_encoder = nn.Linear(numbers, width)
        self.extrinsics_encoder = nn.Linear(EXTRINSICS, width)
        self.predictor_blocks = nn.ModuleList(
            Block(config.predictor) for _ in range(config.pred_depth)
        )
        self.predictor_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.predictor_proj = nn.Linear(width, config.embed_dim)
        self._rotation: Rotation | None = None

    def sources(self, name: str) -> Sequence[Source]:
        return (Source((f"predictor.{name}",)),)

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame."""
        return self.config.conditions + self.config.patches

    def cache(self, samples: int, frames: int, context: FrameCache | None = None) -> FrameCache:
        """An empty cache with room for so many samples and frames after a context."""
        sizes, tokens = self.config.predictor, self.frame_tokens
        room = self.config.pred_depth, 2, samples, sizes.heads, frames * tokens, sizes.head_dim
        return FrameCache(self.predictor_embed.weight.new_empty(room), tokens, context)

    def forward(self, calls: Sequence[Frames]) -> list[Tensor]:
        """Hidden states `[samples, frames, patches, width]` of every call; see `latents`.

        All calls have the same number of frames before, and of frames.
        """
        call = calls[0]
        turned = self._turned(call.first, call.count)
        counts = [c.samples for c in calls]
        begun = [self._begin(call, turned) for call in calls]
        x, *projected = begun[0] if len(begun) == 1 else map(torch.cat, zip(*begun, strict=True))
        for layer, block in enumerate(self.predictor_blocks):
            if layer:
                projected = block.project(x, turned)
            seen = [
                self._attend(layer, call, q, k, v)
                for call, q, k, v in zip(calls, *(t.split(counts) for t in projected), strict=True)
            ]
            x = block.finish(x, seen[0] if len(seen) == 1 else torch.cat(seen))
        for call in calls:
            if call.cache is not None:
                call.cache.own += call.count
        frames = x.unflatten(1, (call.count, -1))[:, :, self.config.conditions :]
        return list(frames.split(counts))

    def latents(self, hidden: Tensor) -> Tensor:
        """Latents `[..., embed_dim]` of hidden states `[..., width]`, not normed."""
        return apply(self.predictor_proj, self.predictor_norm(hidden))

    def normed(self, hidden: Tensor) -> Tensor:
        """Latents as they are used again, of hidden states."""
        return self.norm(self.latents(hidden))

    def norm(self, latents: Tensor) -> Tensor:
        """The norm before latents are used: no scale, no shift."""
        shape = latents.shape[-1:]
        return F.layer_norm(latents, shape, eps=self.config.reps_layer_norm_eps)

    def tokens(self, call: Frames) -> list[Tensor]:
        """Tokens of a call's frames: action, state, camera, patches, each `[samples or 1, frames,
        tokens, width]`."""
        dtype = self.predictor_embed.weight.dtype
        found = [
            self.action_encoder(call.actions.to(dtype)).unsqueeze(2),
            self.state_encoder(call.states.to(dtype)).unsqueeze(2),
        ]
        if self.config.use_extrinsics:
            found.append(self.extrinsics_encoder(call.extrinsics.to(dtype)).unsqueeze(2))
        return [*found, apply(self.predictor_embed, call.latents.to(dtype))]

    def _begin(self, call: Frames, turned: Rotation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens `[samples, tokens, width]`, and queries, keys and values of the first block.

        There, what is the same for all samples is projected once.
        """
        block, samples = self.predictor_blocks[0], call.samples
        groups = [torch.cat([*g], 2) for _, g in groupby(self.tokens(call), len)]
        if len(groups) == 1:
            x = groups[0].expand(samples, -1, -1, -1).flatten(1, 2)
            return x, *block.project(x, turned)
        found, start = [], 0
        for group in groups:
            count, size = group.shape[1:3]
            span = slice(start, start + size)
            own = Rotation(*(t.unflatten(0, (count, -1))[:, span].flatten(0, 1) for t in turned))
            q, k, v = block.project(group.flatten(1, 2), own)
            heads = (t.unflatten(2, (count, size)) for t in (q, k, v))
            found.append([t.expand(samples, *t.shape[1:]) for t in (group, *heads)])
            start += size
        x, *heads = (torch.cat(parts, -2) for parts in zip(*found, strict=True))
        return x.flatten(1, 2), *(t.flatten(2, 3) for t in heads)

    def _attend(self, layer: int, call: Frames, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the frames of a call see: each itself and those before it."""
        see, tokens = attend, self.frame_tokens
        if call.cache is not None:
            k, v = call.cache.put(layer, k, v)
            see = partial(call.cache.attend, layer)
        if call.count == 1:
            return see(q, k, v)
        begin, seen = k.shape[2] - q.shape[2], []
        for frame, part in enumerate(q.split(tokens, 2), start=1):
            end = begin + frame * tokens
            seen.append(see(part, k[:, :, :end], v[:, :, :end]))
        return torch.cat(seen, 2)

    def _turned(self, first: int, count: int) -> Rotation:
        """The rotation of so many frames from number `first` on."""
        device = self.predictor_norm.weight.device
        if self._rotation is None or self._rotation.own.device != device:
            self._rotation = self._tables(device)
        tokens = self.frame_tokens
        span = slice(first * tokens, (first + count) * tokens)
        return Rotation(self._rotation.own[span], self._rotation.other[span])

    def _tables(self, device: torch.device) -> Rotation:
        """The rotation of all frames. Conditions are turned by their time alone; columns are
        stretched to the grid of the rows."""
        config = self.config
        rows, columns = config.grid
        conditions = torch.zeros(config.conditions, device=device)
        row = torch.arange(rows, device=device).float().repeat_interleave(columns)
        column = torch.arange(columns, device=device).float().repeat(rows) * (rows / columns)
        frames = torch.arange(config.max_frames, device=device)
        return rotation(
            frames.repeat_interleave(self.frame_tokens),
            torch.cat([conditions, row]).repeat(config.max_frames),
            torch.cat([conditions, column]).repeat(config.max_frames),
            config.predictor.head_dim,
        )
