"""From token ids to text that can be shown as it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

_UNFINISHED = "\ufffd"  # what a tokenizer puts where bytes of a character are still missing
_LONGEST_CHARACTER = 4  # bytes in UTF-8, so that many tokens at the most


class TextStream:
    """Decodes tokens as they come, in whole characters, and watches for stop strings.

    Text that could be the beginning of a stop string is held back until it is clear that it is
    not. A stop string itself is never given out.

    Args:
        decode: token ids to text, without special tokens.
        stop: strings that end the text.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: str | Sequence[str] = ()
    ) -> None:
        self._decode = decode
        self._stop = [stop] if isinstance(stop, str) else [text for text in stop if text]
        self._ids: list[int] = []
        self._start = 0  # the tokens from here on are decoded together
        self._shown = 0  # the tokens before here are text already
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now. Look at `stopped` afterwards."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._give(self._new_text(final=False))

    def finish(self) -> str:
        """No more tokens: whatever was held back."""
        if self.stopped:
            return ""
        text = self._held + self._new_text(final=True)
        self._held = ""
        cut = self._first_stop(text)
        self.stopped = cut is not None
        return text if cut is None else text[:cut]

    def _new_text(self, *, final: bool) -> str:
        """Text of the tokens not yet shown; empty while their last character is unfinished.

        They are decoded together with the piece before them, because some tokenizers treat the
        first token of a text in a way of its own.
        """
        known = self._decode(self._ids[self._start : self._shown])
        text = self._decode(self._ids[self._start :])
        pending = len(self._ids) - self._shown
        unfinished = text.endswith(_UNFINISHED) and pending < _LONGEST_CHARACTER
        if len(text) <= len(known) or (unfinished and not final):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(known) :]

    def _give(self, fresh: str) -> str:
        text = self._held + fresh
        cut = self._first_stop(text)
        if cut is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str) -> int | None:
        places = [text.find(stop) for stop in self._stop]
        return min((place for place in places if place >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
