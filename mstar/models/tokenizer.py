"""Tokenizers of the `tokenizers` library, as families use them. Any thread may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mstar.errors import InvalidRequest, WeightsError

__all__ = ["FastTokenizer", "open_tokenizer"]


def open_tokenizer(folder: Path) -> Any:
    """What the tokenizer.json in a folder describes.

    Raises:
        WeightsError: there is none, or it is none.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise WeightsError(f"no tokenizer.json in {folder}")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise WeightsError(f"{file} is not a tokenizer: {error}") from error


class FastTokenizer:
    """Text to ids, where marks that are spelled out in text become the mark."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._fast.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of text, with nothing around them.

        Raises:
            InvalidRequest: it is no Unicode text, since it has half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                "text", text, f"character {error.start} is half of a surrogate pair"
            ) from None
        return self._fast.encode(text, add_special_tokens=False).ids
