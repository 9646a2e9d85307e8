"""The contexts of a request: what the decoder is told, and what guidance leads away from.

An image is drawn from up to three contexts: `main` has everything, `without_text` lacks the last
text, `without_images` has the texts alone. The first two have a common beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mstar.engine.kvcache import KVCache
from mstar.engine.prefill import PromptSpan

__all__ = ["Context", "Contexts", "Mark", "Medium"]

Embed = Callable[[], Coroutine[Any, Any, Tensor]]


@dataclass(frozen=True)
class Mark:
    """A place in a context: so many tokens before it, and the rotary position that follows."""

    length: int = 0
    position: int = 0

    def place(self, kv: KVCache) -> KVCache:
        """Roll a sequence back to here."""
        kv.truncate(self.length)
        kv.offset = self.position - self.length
        return kv


@dataclass(frozen=True)
class Medium:
    """An image as the decoder gets it from one of its encoders: what its tokens are (see
    `KVCache.reuse`), what makes their embeddings, and how many, the first ones, run through the
    second expert."""

    content: Sequence[int]
    embed: Embed
    lead: int = 0


@dataclass
class Context:
    """A prompt under construction."""

    spans: list[PromptSpan] = field(default_factory=list)
    end: Mark = Mark()

    def text(self, ids: Sequence[int]) -> None:
        """Append a text span, its marks included."""
        start = self.end.position
        self.spans.append(PromptSpan(ids, range(start, start + len(ids))))
        self.end = Mark(self.end.length + len(ids), start + len(ids))

    def medium(self, medium: Medium) -> None:
        """Append the tokens of an image, all at one position."""
        count, position = len(medium.content), self.end.position
        self.spans.append(PromptSpan(medium.content, [position] * count, medium.embed, medium.lead))
        self.end = Mark(self.end.length + count, position + 1)


class Contexts:
    """The three contexts, filled with the elements of a request in their order."""

    def __init__(self) -> None:
        self.main = Context()
        self.without_images = Context()
        self.without_text = Mark()  # in `main`
        self.has_images = False

    def system(self, ids: Sequence[int]) -> None:
        """What all contexts begin with."""
        self.text(ids)
        self.without_text = self.main.end

    def text(self, ids: Sequence[int]) -> None:
        """What the user, or somebody in the conversation, says."""
        self.without_text = self.main.end
        self.main.text(ids)
        self.without_images.text(ids)

    def image(self, *media: Medium) -> None:
        """One image, as one or two of the encoders see it."""
        for medium in media:
            self.main.medium(medium)
        self.without_text = self.main.end
        self.has_images = True
