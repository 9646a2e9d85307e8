"""How likely the chosen tokens were, and which others were likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LogProbs", "TokenScores"]


@dataclass(frozen=True)
class TokenScores:
    """Natural log of the probability of one token, and of the likeliest ones in falling order.

    They are the network's own: before penalties, biases and temperature.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class LogProbs:
    """The scores of some rows of a batch; read from the device when they are asked for.

    Args:
        logits: float32 `[rows, vocab]`; copied, since sampling overwrites them.
        tops: how many of the likeliest tokens are wanted in each row.
    """

    def __init__(self, logits: Tensor, tops: Sequence[int]) -> None:
        self._scores = torch.log_softmax(logits.float(), dim=-1)
        self._tops = list(tops)
        most = min(max(self._tops), logits.shape[-1])
        self._likeliest = self._scores.topk(most) if most else None

    def of(self, row: int, token: int) -> TokenScores:
        """The scores of a row whose chosen token is `token`."""
        top: list[tuple[int, float]] = []
        if self._likeliest is not None:
            values, ids = (x[row, : self._tops[row]].tolist() for x in self._likeliest)
            top = list(zip(ids, values, strict=True))
        return TokenScores(token, self._scores[row, token].item(), top)
