"""The prompt layout of BAGEL: spans between two marks, no roles, no system prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mstar.errors import WeightsError
from mstar.models.tokenizer import FastTokenizer, open_tokenizer

__all__ = ["THINK_THEN_ANSWER", "THINK_THEN_DRAW", "Tokenizer"]

_THINK = (
    "You should first think about the {what} process in the mind and then {do}. \n"
    "The {what} process is enclosed within <think> </think> tags, i.e. <think> {what} process here "
    "</think> {then} here"
)
# The first text of a request that is to be thought about before text, or before an image.
THINK_THEN_ANSWER = _THINK.format(
    what="reasoning", do="provide the user with the answer", then="answer"
)
THINK_THEN_DRAW = _THINK.format(what="planning", do="generate the image", then="image")

_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


class Tokenizer(FastTokenizer):
    """The byte-level BPE of a checkpoint. Any thread may use it.

    Marks that are spelled out in text (`<|im_end|>`) become the mark, as in the published code.

    Attributes:
        start, end: ids around text; text is generated after `start`, until `end`.
        image_start, image_end: ids around the tokens of an image.

    Raises:
        WeightsError: there is none, or another model's.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(open_tokenizer(folder))
        ids = {mark: self._fast.token_to_id(mark) for mark in _MARKS}
        if lacking := [mark for mark, token in ids.items() if token is None]:
            file = folder / "tokenizer.json"
            raise WeightsError(f"{file} is not BAGEL's: it has no {', '.join(lacking)}")
        self.start, self.end, self.image_start, self.image_end = ids.values()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, with marks spelled out; bytes that are no text become U+FFFD."""
        return self._fast.decode(list(ids), skip_special_tokens=False)

    def shown(self, ids: Sequence[int]) -> str:
        """Text of ids as users see it, without marks."""
        return self._fast.decode(list(ids), skip_special_tokens=True)

    def text_span(self, text: str) -> list[int]:
        """A piece of text as it stands in a context."""
        return [self.start, *self.encode(text), self.end]

    def answer(self, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The text of ids that were generated after `start`, up to the first mark around text, or
        to one of the strings `stop`."""
        text = self.decode(ids)
        return min((text.split(end, 1)[0] for end in (*_MARKS[:2], *stop)), key=len)
