"""The connector: features of the vision encoder to inputs of the decoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.layers.linear import linear

__all__ = ["Connector"]


class Connector(nn.Module):
    """Two linear layers with a GELU (in its tanh form) between them."""

    def __init__(self, features: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """`[patches, features]` to `[patches, hidden]`, before the positions are added."""
        h = F.gelu(linear(features, self.fc1.weight, self.fc1.bias), approximate="tanh")
        return linear(h, self.fc2.weight, self.fc2.bias)
