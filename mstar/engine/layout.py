"""How the tokens of a batch of spans are ordered, so that every expert gets neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mstar.engine.spans import Span, Step

__all__ = ["Layout", "Piece"]


class Piece(NamedTuple):
    """`count` tokens of a span, from its token `first` on."""

    span: Span
    first: int
    count: int

    @property
    def inputs(self) -> Sequence[int] | Tensor | Step:
        """Of these tokens."""
        span = self.span
        whole = self.count == span.count
        return span.inputs if whole else span.inputs[self.first : self.first + self.count]

    @property
    def positions(self) -> Sequence[int] | Tensor:
        """Rotary positions of these tokens: integers, or float32 `[tokens]` or `[3, tokens]`."""
        span, last = self.span, self.first + self.count
        if isinstance(span.positions, Tensor):
            return span.positions[..., self.first : last]
        if span.positions is not None:
            return span.positions[self.first : last]
        begin = span.kv.length + span.kv.offset
        if isinstance(begin, float):
            places = range(self.first, last)
            return torch.tensor([begin + place for place in places], dtype=torch.float32)
        return range(begin + self.first, begin + last)


class Layout:
    """The tokens of all spans in the order in which the network gets them.

    The tokens of the second expert come first, `lead` in all, then those of the first expert; each
    span's are in one piece there. No kernel needs to know: a piece is attended like a sequence of
    its own over the pages of its span.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.pieces = [Piece(span, 0, span.lead) for span in spans if span.lead]
        self.lead = sum(span.lead for span in spans)
        self.pieces += [
            Piece(span, span.lead, span.count - span.lead)
            for span in spans
            if span.lead < span.count
        ]
        self.counts = [piece.count for piece in self.pieces]
        self._last: dict[Span, int] = {}
        start = 0
        for span, _, count in self.pieces:
            start += count
            self._last[span] = start - 1

    @property
    def positions(self) -> list[int] | Tensor:
        """Of all tokens: integers, or float32 `[tokens]` or `[3, tokens]` where a piece has such.

        What has one position counts on all three axes alike.
        """
        parts = [piece.positions for piece in self.pieces]
        if not any(isinstance(part, Tensor) for part in parts):
            return [place for part in parts for place in part]
        rows = [torch.as_tensor(part, dtype=torch.float32) for part in parts]
        if any(part.dim() == 2 for part in rows):
            rows = [part.expand(3, -1) for part in rows]
        return torch.cat(rows, -1)

    @property
    def ends(self) -> list[int] | None:
        """Where in the sequence each piece ends; None where all end with their sequence."""
        if not self.lead:
            return None
        return [piece.span.kv.length + piece.first + piece.count for piece in self.pieces]

    def last(self, span: Span) -> int:
        """The row of a span's last token."""
        return self._last[span]
