"""The tokenizer of a checkpoint: byte-level BPE with the marks of Qwen3-Omni."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mstar.errors import WeightsError
from mstar.models.tokenizer import FastTokenizer

__all__ = ["Tokenizer"]

# How text is taken apart before merging; in tokenizer.json, where there is one.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer(FastTokenizer):
    """Text <-> ids. Any thread may use it.

    Marks that are spelled out in text (`<|im_end|>`) become the mark, as in the published code.

    Raises:
        WeightsError: there is none, or another model's.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(_open(folder))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids as users see it, without marks; bytes that are no text become U+FFFD."""
        return self._fast.decode(list(ids), skip_special_tokens=True)


def _open(folder: Path) -> Any:
    from tokenizers import Tokenizer as Fast

    file = folder / "tokenizer.json"
    try:
        return Fast.from_file(str(file)) if file.is_file() else _of_vocabulary(folder)
    except FileNotFoundError as error:
        raise WeightsError(f"no tokenizer.json in {folder}, and no {error.filename}") from error
    except Exception as error:
        raise WeightsError(f"no tokenizer can be made of the files in {folder}: {error}") from error


def _of_vocabulary(folder: Path) -> Any:
    """From vocab.json, merges.txt and the marks in tokenizer_config.json."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    fast = Fast(models.BPE(vocabulary, merges))
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    marks = sorted((int(i), entry) for i, entry in config["added_tokens_decoder"].items())
    for index, entry in marks:
        token = AddedToken(entry["content"], normalized=False, special=entry["special"])
        (fast.add_special_tokens if entry["special"] else fast.add_tokens)([token])
        if fast.token_to_id(entry["content"]) != index:
            raise ValueError(f"{entry['content']} should be token {index}")
    return fast
