"""Which stretch of frames the codec decodes next, and which part of it is heard.

The codec is a stack of convolutions: a frame's samples depend on a few frames on either side. With
that many frames of context around it a frame comes out as in one decode of the whole utterance
(reference notes, section 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Window", "WindowPlan"]


@dataclass(frozen=True)
class Window:
    """Decode frames `[low, high)`; frames `[start, end)` of them are heard."""

    low: int
    high: int
    start: int
    end: int


class WindowPlan:
    """Plans the windows of one utterance as its frames arrive.

    Args:
        context: frames on each side that make a window exact.
        lookahead: frames that must follow the first one before it is heard. Fewer than `context`
            make it early and approximate; the look-ahead then grows by one with every frame.
        chunk: frames heard per window.
    """

    def __init__(self, context: int, lookahead: int, chunk: int) -> None:
        self.context = context
        self.lookahead = min(lookahead, context)
        self.chunk = chunk
        self.heard = 0

    def ready(self, frames: int, *, ended: bool = False) -> Iterator[Window]:
        """Windows that can be decoded now that there are `frames` frames."""
        while self.heard < frames:
            end = min(self.heard + self.chunk, frames)
            ahead = self.context if ended else min(self.lookahead + self.heard, self.context)
            if not ended and self.heard + self.chunk + ahead > frames:
                return
            low, high = max(0, self.heard - self.context), min(end + ahead, frames)
            yield Window(low, high, self.heard, end)
            self.heard = end
