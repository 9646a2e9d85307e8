"""The prompt layout of Orpheus, and how long text is cut into utterances."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mstar.errors import WeightsError

__all__ = ["LONGEST", "load_tokenizer", "prompt_ids", "split_sentences"]

START_OF_HUMAN, END_OF_HUMAN = 128259, 128260
START_OF_AI, START_OF_SPEECH = 128261, 128257
END_OF_TEXT = 128009
STOP = 128258

# About half a minute of speech: well inside the default of 4096 tokens (50 s).
LONGEST = 400

# A sentence or clause, with what closes it and the white space after it. A Latin full stop or comma
# ends one only before white space: 3.14, 10,000, 12:30.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])[\"'”’)\]」』]*\s*|\n+")
_CLAUSE_END = re.compile(r"(?<=[,;:])\s+|(?<=[—、，；：])\s*")
_WORD_END = re.compile(r"\s+")


def load_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """The text-to-ids function of the tokenizer in `folder`. It begins with 128000 itself.

    Raises:
        WeightsError: there is none.
    """
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise WeightsError(f"no tokenizer.json in {folder}")
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file)).backend_tokenizer
    except Exception as error:
        raise WeightsError(f"{file} is not a tokenizer: {error}") from error
    return lambda text: tokenizer.encode(text).ids


def prompt_ids(encode: Callable[[str], list[int]], text: str, voice: str) -> list[int]:
    """Token ids after which the next token is the first of the speech."""
    spoken = encode(f"{voice}: {text}" if voice else text)
    return [START_OF_HUMAN, *spoken, END_OF_TEXT, END_OF_HUMAN, START_OF_AI, START_OF_SPEECH]


def split_sentences(text: str, longest: int = LONGEST) -> list[str]:
    """Cut text into utterances of at most about `longest` characters.

    Cuts are at the ends of sentences; only a sentence that is too long alone is cut at commas, and
    failing that between words. Nothing but white space at a cut is lost.
    """
    if len(text) <= longest:
        return [text]
    utterances = [piece.strip() for piece in _split(text.strip(), longest, _BOUNDARIES)]
    return [utterance for utterance in utterances if utterance] or [""]


_BOUNDARIES = (_SENTENCE_END, _CLAUSE_END, _WORD_END)


def _split(text: str, longest: int, boundaries: tuple[re.Pattern[str], ...]) -> list[str]:
    """Stretches of `text`, which joined make it again, as long as they may be.

    Those that are too long between two of the first kind of boundary are split at the next kind.
    """
    if len(text.rstrip()) <= longest:
        return [text]
    if not boundaries:
        return [text[i : i + longest] for i in range(0, len(text), longest)]
    ends = [match.end() for match in boundaries[0].finditer(text)]
    pieces: list[str] = []
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        pieces += _split(text[start:end], longest, boundaries[1:])
    packed = pieces[:1]
    for piece in pieces[1:]:
        if len((packed[-1] + piece).rstrip()) <= longest:
            packed[-1] += piece
        else:
            packed.append(piece)
    return packed
