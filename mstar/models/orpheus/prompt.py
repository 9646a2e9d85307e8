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

_SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"'”’)\]]*(?:\s+|(?<=[。！？]))|\n+")
_CLAUSE_END = re.compile(r"(?<=[,;:—、，；：])\s*")


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
    failing that between words.
    """
    if len(text) <= longest:
        return [text]
    pieces: list[str] = []
    for sentence in _cut(text, _SENTENCE_END):
        pieces += [sentence] if len(sentence) <= longest else _cut_long(sentence, longest)
    return _pack(pieces, longest)


def _cut(text: str, boundary: re.Pattern[str]) -> list[str]:
    """Pieces of `text`, each with what closes it; no character but white space is lost."""
    pieces, start = [], 0
    for match in boundary.finditer(text):
        pieces.append(text[start : match.end()].strip())
        start = match.end()
    pieces.append(text[start:].strip())
    return [piece for piece in pieces if piece]


def _cut_long(sentence: str, longest: int) -> list[str]:
    pieces: list[str] = []
    for clause in _cut(sentence, _CLAUSE_END):
        if len(clause) <= longest:
            pieces.append(clause)
            continue
        for word in _pack(clause.split(), longest):
            pieces += [word[i : i + longest] for i in range(0, len(word), longest)]
    return pieces


def _pack(pieces: list[str], longest: int) -> list[str]:
    packed = pieces[:1]
    for piece in pieces[1:]:
        if len(packed[-1]) + 1 + len(piece) <= longest:
            packed[-1] = f"{packed[-1]} {piece}"
        else:
            packed.append(piece)
    return packed
