"""The prompt layout of Orpheus, and how long text is cut into utterances."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mstar.errors import InvalidRequest, WeightsError
from mstar.models.tokenizer import open_tokenizer

__all__ = ["LONGEST", "MOST_TEXT", "load_tokenizer", "prompt_ids", "split_sentences", "spoken"]

Encode = Callable[[str], list[int]]

START_OF_HUMAN, END_OF_HUMAN = 128259, 128260
START_OF_AI, START_OF_SPEECH = 128261, 128257
END_OF_TEXT = 128009
STOP = 128258
_BEGIN_OF_TEXT = 128000

# About half a minute of speech: well inside the default of 4096 tokens (50 s).
LONGEST = 400
# Characters in one request: about two hours of speech.
MOST_TEXT = 100_000

# Control characters but tab, line feed, vertical tab, form feed, carriage return and next line.
_SILENT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")

# A sentence or clause, with what closes it and the white space after it. A Latin full stop or comma
# ends one only before white space: 3.14, 10,000, 12:30.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])[\"'”’)\]」』]*\s*|\n+")
_CLAUSE_END = re.compile(r"(?<=[,;:])\s+|(?<=[—、，；：])\s*")
_WORD_END = re.compile(r"\s+")


def load_tokenizer(folder: Path) -> Encode:
    """The text-to-ids function of the tokenizer in `folder`; any thread may call it.

    Ids begin with 128000. The rest is text: a control token that is spelled out in it
    (`<|eot_id|>`, `<custom_token_5>`) is read letter by letter, as `<laugh>` is, and never becomes
    the token, because this tokenizer knows only the vocabulary that text was trained with.

    Raises:
        WeightsError: there is none, or another model's.
    """
    from tokenizers import Tokenizer

    full = open_tokenizer(folder)
    plain = Tokenizer(full.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(full, part) is not None:
            setattr(plain, part, getattr(full, part))
    begin = plain.encode("").ids
    if begin != [_BEGIN_OF_TEXT]:
        raise WeightsError(
            f"{folder / 'tokenizer.json'} is not Orpheus': "
            f"text begins with the ids {begin}, not [{_BEGIN_OF_TEXT}]"
        )
    return lambda text: plain.encode(text).ids


def spoken(field: str, text: str) -> str:
    """`text` without the control characters in it that are not white space (NUL, escape, ...).

    Raises:
        InvalidRequest: it is no Unicode text, since it has half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            field,
            text,
            f"character {error.start} is half of a surrogate pair, which stands for nothing",
        ) from None
    return _SILENT.sub("", text)


def prompt_ids(encode: Encode, text: str, voice: str) -> list[int]:
    """Token ids after which the next token is the first of the speech.

    Raises:
        InvalidRequest: the tokenizer cannot take the text.
    """
    try:
        ids = encode(f"{voice}: {text}" if voice else text)
    except Exception as error:
        raise InvalidRequest("text", text, f"the tokenizer cannot take it: {error}") from error
    return [START_OF_HUMAN, *ids, END_OF_TEXT, END_OF_HUMAN, START_OF_AI, START_OF_SPEECH]


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
