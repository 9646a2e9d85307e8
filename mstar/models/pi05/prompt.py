"""The prompt: the task and, in most policies, the state as numbers from 0 to 255."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mstar.errors import InvalidRequest, WeightsError
from mstar.models.tokenizer import FastTokenizer, open_tokenizer

__all__ = ["Tokenizer", "cleaned", "prompt_text", "state_bins"]

log = logging.getLogger("mstar")
_BOS = "<bos>"
_EDGES = np.arange(256) / 128 - 1  # exact in float32, too


def cleaned(task: str) -> str:
    """A task as it stands in a prompt; inner double spaces and case stay."""
    return task.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: np.ndarray) -> np.ndarray:
    """Bins, int `[..., dims]`, of a normalised state; -1 below -1, and 255 from 127/128 on."""
    return np.searchsorted(_EDGES.astype(state.dtype), state, side="right") - 1


def prompt_text(task: str, state: np.ndarray) -> str:
    """The prompt of a normalised state `[dims]`."""
    numbers = " ".join(map(str, state_bins(state).tolist()))
    return f"Task: {cleaned(task)}, State: {numbers};\nAction: "


class Tokenizer(FastTokenizer):
    """PaliGemma's, from the tokenizer.json in a folder. Any thread may use it.

    Args:
        max_length: longer prompts are cut off at the right.

    Raises:
        WeightsError: there is none, or another model's.
    """

    def __init__(self, folder: Path, max_length: int) -> None:
        super().__init__(open_tokenizer(folder))
        _forget(self._fast)
        self._fast.no_padding()
        self._fast.no_truncation()
        self.bos = self._fast.token_to_id(_BOS)
        self.max_length, self._cut = max_length, False
        if self.bos is None:
            file = folder / "tokenizer.json"
            raise WeightsError(f"{file} is not PaliGemma's: it has no {_BOS}")

    def with_state(self, task: str, state: np.ndarray) -> list[int]:
        """Ids of the prompt of a normalised state."""
        return self._ids(prompt_text(task, state))

    def without_state(self, task: str) -> list[int]:
        """Ids of openpi's prompt for policies that do not read the state in it."""
        return self._ids(cleaned(task), "\n")

    def _ids(self, *texts: str) -> list[int]:
        try:
            found: Sequence[Sequence[int]] = [
                self._fast.encode(text, add_special_tokens=False).ids for text in texts
            ]
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest("text", texts[0], "must be Unicode text") from error
        ids = [self.bos, *(token for each in found for token in each)]
        if len(ids) > self.max_length and not self._cut:
            self._cut = True
            log.warning(
                "a prompt of %d tokens is cut to %d, as published, its end (the state) is lost; "
                "further ones will be, too, without a word: %.80r",
                len(ids),
                self.max_length,
                texts[0],
            )
        return ids[: self.max_length]


def _forget(tokenizer: Any) -> None:
    """Keep no prompts: one that spells the state out never comes again, and thousands of them are
    tens of megabytes, which a control loop would see as a leak."""
    resize = getattr(tokenizer.model, "_resize_cache", None)
    if resize is not None:
        resize(0)
