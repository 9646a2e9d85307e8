"""Text as it is generated: tokens to whole characters, ended by stop strings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

from mstar.engine.lm import Generation
from mstar.io.text import TextStream

__all__ = ["TextGeneration"]


class TextGeneration:
    """Pieces of text of a `Generation`. `finish_reason` says why it ended, once it has.

    Args:
        tokens: from `LanguageModel.generate`.
        decode: token ids to text, without special tokens.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(
        self,
        tokens: Generation,
        decode: Callable[[Sequence[int]], str],
        stop: str | Sequence[str] = (),
    ) -> None:
        self.finish_reason: str | None = None
        self._tokens = tokens
        self._text = TextStream(decode, stop)

    async def __aiter__(self) -> AsyncIterator[str]:
        text = self._text
        async with aclosing(aiter(self._tokens)) as tokens:
            async for token in tokens:
                if piece := text.push(token):
                    yield piece
                if text.stopped:
                    break
        if not text.stopped and (piece := text.finish()):
            yield piece
        self.finish_reason = "stop" if text.stopped else self._tokens.finish_reason
