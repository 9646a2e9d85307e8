"""The attention context of a batch whose keys and values are in the pages of a pool."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mstar.engine.kernels.dispatch import use_triton
from mstar.engine.kernels.paged_attention import paged_attention
from mstar.engine.kernels.paged_batch import BatchTensors, PagedBatch, tensors_of
from mstar.engine.kernels.paged_shared import with_shared
from mstar.engine.kernels.rotary_store import paired_angles, rotary_store
from mstar.engine.kvcache import KVPool
from mstar.engine.layers.attention import Projected

__all__ = ["PagedContext"]


class PagedContext:
    """The tokens of a batch over the pages of a pool.

    Args:
        batch: which tokens belong to which sequence.
        slots: int64 `[tokens]`, where in the pool each token's keys and values go.
    """

    def __init__(self, pool: KVPool, batch: PagedBatch | BatchTensors, slots: Tensor) -> None:
        self.pool = pool
        self.batch = batch
        self.slots = slots
        self._angles: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def attend(
        self,
        layer: int,
        parts: Sequence[Projected],
        angles: tuple[Tensor, Tensor],
        heads: int,
        kv_heads: int,
    ) -> Tensor:
        """See `layers.attention.AttentionContext.attend`."""
        if self._angles is None or self._angles[0] is not angles:
            self._angles = angles, paired_angles(*angles)
        angles = self._angles[1]
        keys, values = self.pool.layer(layer)
        if len(parts) == 1:
            qkv, norms = parts[0]
            q = rotary_store(qkv, *angles, keys, values, self.slots, heads, kv_heads, norms)
        else:
            cos, sin = angles
            q = parts[0].qkv.new_empty(len(cos), heads, keys.shape[-1])
            start = 0
            for qkv, norms in parts:
                rows = slice(start, start + len(qkv))
                start = rows.stop
                rotary_store(
                    qkv,
                    cos[rows],
                    sin[rows],
                    keys,
                    values,
                    self.slots[rows],
                    heads,
                    kv_heads,
                    norms,
                    q[rows],
                )
        if use_triton(q):
            self.batch = with_shared(tensors_of(self.batch, q.device), q, keys)  # once per step
        return paged_attention(q, keys, values, self.batch, q.shape[-1] ** -0.5).flatten(1)
