"""A weight alone, for norms and tables that a kernel applies."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Weight"]


class Weight(nn.Module):
    """One parameter called `weight`, not initialised (torch's own modules take a second for it)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
