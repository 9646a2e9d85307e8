"""The two networks of a checkpoint, without their weights, and whether they make an Orpheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from mstar.errors import WeightsError
from mstar.models.orpheus.frames import CODES, FIRST_CODE, SLOTS
from mstar.models.orpheus.llama import Llama, LlamaConfig
from mstar.models.orpheus.snac import SnacConfig, SnacDecoder

__all__ = ["networks"]

_T = TypeVar("_T")
_STRIDES = tuple(len(SLOTS[-1]) // len(slots) for slots in SLOTS)
_TOKENS = FIRST_CODE + CODES * sum(map(len, SLOTS))


def networks(folders: Mapping[str, Path]) -> tuple[Llama, SnacDecoder]:
    """The decoder and the codec that the config.json of `lm` and of `snac` describe, on "meta".

    Raises:
        WeightsError: a config.json is missing or wrong, or Orpheus cannot speak with such a
            network: its audio tokens are 7 slots of 4096 codes for three codebooks.
    """
    files = {part: folders[part] / "config.json" for part in ("lm", "snac")}
    with torch.device("meta"):
        llama = _build(files["lm"], lambda file: Llama(LlamaConfig.from_file(file)))
        snac = _build(files["snac"], lambda file: SnacDecoder(SnacConfig.from_file(file)))
    size, codec = llama.vocab_size, snac.config
    if size < _TOKENS:
        raise _not_orpheus(files["lm"], "vocab_size", size, f"{_TOKENS} or more, for its codes")
    if codec.codebook_size != CODES:
        raise _not_orpheus(files["snac"], "codebook_size", codec.codebook_size, str(CODES))
    if codec.vq_strides != _STRIDES:
        strides = list(codec.vq_strides)
        raise _not_orpheus(files["snac"], "vq_strides", strides, str(list(_STRIDES)))
    return llama, snac


def _build(file: Path, make: Callable[[Path], _T]) -> _T:
    try:
        return make(file)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no {file}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(f"cannot use {file}: {error}") from error


def _not_orpheus(file: Path, field: str, value: Any, needed: str) -> WeightsError:
    return WeightsError(f"{file} is not Orpheus': {field}={value!r}, and it must be {needed}")
