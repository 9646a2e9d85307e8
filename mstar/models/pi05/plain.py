"""The policy as it is published: every camera slot and all of the text padded, masks, no tables.

What the fast path (`networks.py`) is compared with, in tests and benchmarks. Every step runs the
time MLP and projects its result for every norm; absent images are encoded, and masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.models.pi05.flow import Steered, Velocity, euler
from mstar.models.pi05.networks import Policy
from mstar.models.pi05.timestep import flow_times

__all__ = ["PlainPolicy"]

_EPS = 1e-6
Layers = list[tuple[Tensor, Tensor]]


class PlainPolicy:
    """A batch of padded observations at a time.

    Args:
        policy: with its weights; `whole`, for the output of the prefix.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.trunk, self.heads = policy.trunk, policy.heads
        self.sizes = policy.config.prefix

    def embed(
        self, images: Tensor, image_masks: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens `[batch, room, width]` and which are valid, bool `[batch, room]`.

        Args:
            images: float32 `[batch, cameras, 3, height, width]`.
            image_masks: which are there, bool `[batch, cameras]`.
            ids, mask: text and which of it is valid, `[batch, text]`.
        """
        batch, cameras = images.shape[:2]
        seen = self.policy.encode_images(images.flatten(0, 1)).unflatten(0, (batch, cameras))
        text = self.policy.embed_text(ids)
        valid = image_masks.bool().repeat_interleave(seen.shape[2], 1)
        return torch.cat([seen.flatten(1, 2), text], 1), torch.cat([valid, mask.bool()], 1)

    def prefix(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor | None, Layers]:
        """The final norm's output, and keys (rotated) and values `[batch, kv_heads, room, dim]`."""
        angles = self._angles(valid.long().cumsum(1) - 1)
        kv: Layers = []
        x = tokens
        for layer in self.trunk.prefix.layers:
            h = _norm(x, layer.input_layernorm.weight)
            if not hasattr(layer, "o_proj"):
                k, v = self._heads(layer.qkv_proj(h)).chunk(2, 1)
                return None, [*kv, (_rotate(k, angles), v)]
            q, k, v = self._qkv(layer.qkv_proj(h), angles)
            kv.append((k, v))
            x = x + layer.o_proj(_attend(q, k, v, valid))
            h = _norm(x, layer.post_attention_layernorm.weight)
            x = x + layer.mlp(h)
        return _norm(x, self.trunk.prefix.norm.weight), kv

    def velocity_at(self, kv: Layers, valid: Tensor, x: Tensor, times: Tensor) -> Tensor:
        """Velocities `[batch, horizon, actions]` at times float32 `[batch, horizon or 1]`."""
        ones = valid.new_ones(x.shape[:2])
        seen = torch.cat([valid, ones], 1)
        angles = self._angles(valid.sum(1, keepdim=True) + ones.long().cumsum(1) - 1)
        condition = self.heads.condition(times.flatten()).unflatten(0, times.shape)
        weights = self.heads.modulation.weight.unflatten(
            0, (-1, 3 * self.policy.config.expert.width)
        )
        biases = self.heads.modulation.bias.view(len(weights), -1)
        norms = zip(weights, biases, strict=True)

        def norm(x: Tensor) -> tuple[Tensor, Tensor]:
            scale, shift, gate = F.linear(condition, *next(norms)).chunk(3, -1)
            return _norm(x, 1 + scale, shift), gate.to(x.dtype)

        x = self.heads.tokens(x).to(kv[0][0].dtype)
        for layer, (prefix_k, prefix_v) in zip(self.trunk.expert.layers, kv, strict=True):
            h, gate = norm(x)
            q, k, v = self._qkv(layer.qkv_proj(h), angles)
            k, v = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
            x = x + gate * layer.o_proj(_attend(q, k, v, seen))
            h, gate = norm(x)
            x = x + gate * layer.mlp(h)
        return self.heads.velocity(norm(x)[0])

    def velocity(self, kv: Layers, valid: Tensor, steps: int) -> Velocity:
        """Velocities after observations, at the times of so many steps."""
        times = flow_times(steps)

        def velocity(x: Tensor, step: int, clean: Tensor | None = None) -> Tensor:
            at = torch.full((len(x), 1), times[step], device=x.device)
            if clean is not None:
                at = at.where(~clean.expand(len(x), -1), 0.0)
            return self.velocity_at(kv, valid, x, at)

        return velocity

    def sample(
        self,
        images: Tensor,
        image_masks: Tensor,
        ids: Tensor,
        mask: Tensor,
        noise: Tensor,
        steps: int,
        steered: Steered | None = None,
    ) -> Tensor:
        """Actions float32 `[batch, horizon, actions]`; see `embed` and `Policy.denoise`."""
        tokens, valid = self.embed(images, image_masks, ids, mask)
        _, kv = self.prefix(tokens, valid)
        return euler(self.velocity(kv, valid, steps), noise, steps, steered)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 `[batch, 1, tokens, head_dim / 2]`."""
        cos, sin = self.trunk.prefix.rotary.angles(positions.flatten())
        return tuple(x.unflatten(0, positions.shape).unsqueeze(1) for x in (cos, sin))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.sizes.head_dim)).transpose(1, 2)

    def _qkv(self, qkv: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads = self.sizes.num_kv_heads
        q, k, v = self._heads(qkv).split([self.sizes.num_heads, kv_heads, kv_heads], 1)
        return _rotate(q, angles), _rotate(k, angles), v


def _norm(x: Tensor, scale: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)
    return (normed * scale + shift).to(x.dtype)


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = angles
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """`[batch, tokens, heads * dim]` of `[batch, heads, tokens, dim]`; keys that are not valid are
    not attended to."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~valid[:, None, None], -2.3819763e38)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
