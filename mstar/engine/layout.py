"""How the tokens of a batch of spans are ordered, so that every expert gets neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    def positions(self) -> Sequence[int]:
        """Rotary positions of these tokens."""
        span, last = self.span, self.first + self.count
        if span.positions is not None:
            return span.positions[self.first : last]
        begin = span.kv.length + span.kv.offset
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
        self._rows: dict[Span, tuple[int, int]] = {}
        self._last: dict[Span, int] = {}
        start = 0
        for span, _, count in self.pieces:
            self._rows.setdefault(span, (start, start + count))
            start += count
            self._last[span] = start - 1

    @property
    def ends(self) -> list[int] | None:
        """Where in the sequence each piece ends; None where all end with their sequence."""
        if not self.lead:
            return None
        return [piece.span.kv.length + piece.first + piece.count for piece in self.pieces]

    def rows(self, span: Span) -> tuple[int, int]:
        """The first row of a span and the row after its last; of its lead, if it has one."""
        return self._rows[span]

    def last(self, span: Span) -> int:
        """The row of a span's last token."""
        return self._last[span]
