"""What encoders made of media, kept for the next request with the same bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

__all__ = ["FeatureCache"]


class FeatureCache:
    """Tensors by key, least recently used out first. For the engine's thread alone.

    Args:
        max_bytes: most that all of them may take; larger ones are not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self._features: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: Hashable) -> tuple[Tensor, ...] | None:
        """What is kept under `key`."""
        found = self._features.get(key)
        if found is not None:
            self.hits += 1
            self._features.move_to_end(key)
        return found

    def put(self, key: Hashable, *features: Tensor) -> None:
        """Keep tensors under `key`."""
        size = _bytes(features)
        if size > self.max_bytes or key in self._features:
            return
        self._features[key] = features
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, oldest = self._features.popitem(last=False)
            self.bytes -= _bytes(oldest)


def _bytes(features: tuple[Tensor, ...]) -> int:
    return sum(x.untyped_storage().nbytes() for x in features)
