"""The networks of a checkpoint, which is one set of (sharded) safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mstar.engine.checkpoint import Checkpoint
from mstar.engine.weights import Source
from mstar.errors import WeightsError
from mstar.models.base import filled
from mstar.models.qwen3_omni.audio import AudioEncoder
from mstar.models.qwen3_omni.config import OmniConfig
from mstar.models.qwen3_omni.decoder import prefixed
from mstar.models.qwen3_omni.talker import Talker
from mstar.models.qwen3_omni.thinker import Thinker
from mstar.models.qwen3_omni.vision import VisionEncoder
from mstar.models.qwen3_omni.vocoder import Vocoder

__all__ = ["Networks", "Omni", "load_networks", "networks"]

# Our modules -> where their parameters are in a checkpoint; the first that fits counts.
_PREFIXES = {
    "audio": "thinker.audio_tower.",
    "vision": "thinker.visual.",
    "thinker.decoder": "thinker.model.",
    "thinker.embed_tokens": "thinker.model.embed_tokens.",
    "thinker": "thinker.",
    "talker.code_predictor.decoder": "talker.code_predictor.model.",
    "talker.code_predictor": "talker.code_predictor.",
    "talker.decoder": "talker.model.",
    "talker.codec_embedding": "talker.model.codec_embedding.",
    "talker": "talker.",
    "vocoder": "code2wav.",
}


class Omni(nn.Module):
    """All that runs in the model's dtype: encoders, Thinker, and Talker if it speaks."""

    def __init__(self, config: OmniConfig) -> None:
        super().__init__()
        self.config = config
        talker = config.talker
        self.audio = AudioEncoder(config.thinker.audio)
        self.vision = VisionEncoder(config.thinker.vision)
        tap = None if talker is None else talker.accept_hidden_layer
        self.thinker = Thinker(config.thinker.text, config.thinker.deepstack, tap)
        self.talker = None if talker is None else Talker(talker)

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint."""
        return _sources(self, name)


class _VocoderWeights(nn.Module):
    """The vocoder, as a part of a checkpoint."""

    def __init__(self, vocoder: Vocoder) -> None:
        super().__init__()
        self.vocoder = vocoder

    def sources(self, name: str) -> Sequence[Source]:
        return _sources(self, name)


@dataclass(frozen=True)
class Networks:
    """Everything of a checkpoint; `vocoder` is `None` where nothing is spoken."""

    omni: Omni
    vocoder: Vocoder | None


def networks(folder: Path, *, speech: bool = True) -> Networks:
    """The networks that the config.json in `folder` describes, without weights, on "meta".

    Args:
        speech: whether to speak, if the checkpoint can.

    Raises:
        WeightsError: the config is missing or wrong.
    """
    try:
        config = OmniConfig.from_file(folder / "config.json")
    except FileNotFoundError as error:
        raise WeightsError(f"there is no {error.filename}") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot use {folder / 'config.json'}: {error}") from error
    if not speech:
        config = config.silent()
    with torch.device("meta"):
        vocoder = None if config.vocoder is None else Vocoder(config.vocoder)
        return Networks(Omni(config), vocoder)


def load_networks(folder: Path, *, speech: bool = True, **how: Any) -> Networks:
    """The networks as `filled` has them, but for the vocoder, which is always float32.

    Args:
        speech: whether to speak, if the checkpoint can; if not, those weights are not read.
    """
    found, checkpoint = networks(folder, speech=speech), cache(partial(Checkpoint.open, folder))
    filled(found.omni, checkpoint, **how)
    if found.vocoder is not None:
        filled(_VocoderWeights(found.vocoder), checkpoint, **{**how, "dtype": torch.float32})
    return found


def _sources(module: nn.Module, name: str) -> Sequence[Source]:
    """The sources that the part of `module` with a parameter says, with the part's prefix."""
    path = next(path for path in _PREFIXES if name.startswith(f"{path}."))
    own = getattr(module.get_submodule(path), "sources", None)
    rest = name.removeprefix(f"{path}.")
    found = (Source((rest,)),) if own is None else own(rest)
    return [prefixed(source, _PREFIXES[path]) for source in found]
