"""Latents that stay where the engine computes: encoded once, used as often as one likes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mstar.engine.request import Request
from mstar.errors import InvalidRequest

__all__ = ["Latents", "give", "latents_of"]


class Latents:
    """A handle on latents, of `Engine.encode` or `Engine.predict`: a tensor on its device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def numpy(self) -> np.ndarray:
        """Float32."""
        return self.tensor.float().cpu().numpy()

    def __getitem__(self, index: Any) -> Latents:
        """A handle on some of them: frames of a clip, say."""
        return Latents(self.tensor[index])

    def __len__(self) -> int:
        return len(self.tensor)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.numpy().astype(dtype or np.float32, copy=False)

    def __repr__(self) -> str:
        return f"Latents(shape={list(self.shape)})"


def give(request: Request, latents: Tensor, **metadata: Any) -> None:
    """Emit latents as float32, with their shape in the metadata."""
    array = latents.float().cpu().numpy()
    request.emit_latents(array, dtype="float32", shape=list(array.shape), **metadata)


def latents_of(field: str, value: Any) -> Tensor:
    """The latents that were given: a handle, a tensor, or an array of finite numbers. Refuses
    anything else."""
    if isinstance(value, Latents):
        return value.tensor
    try:
        is_tensor = isinstance(value, Tensor)
        found = value if is_tensor else torch.from_numpy(np.array(value, np.float32))
        if not found.is_floating_point() or not found.isfinite().all():
            raise ValueError
    except (RuntimeError, TypeError, ValueError):  # a sparse tensor, say
        raise InvalidRequest(field, type(value).__name__, "must be finite latents") from None
    return found.detach()
