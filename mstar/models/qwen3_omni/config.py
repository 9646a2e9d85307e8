"""The config.json of Qwen3-Omni: three models (Thinker, Talker, vocoder) and the ids they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mstar.models.fields import (
    check_flags,
    check_numbers,
    check_sizes,
    check_values,
    object_of,
    read_object,
    required,
)
from mstar.models.qwen3_omni.sizes import (
    AudioConfig,
    DecoderConfig,
    VisionConfig,
    VocoderConfig,
    made,
)

__all__ = ["OmniConfig", "TalkerConfig", "ThinkerConfig"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class ThinkerConfig:
    """What reads, listens, looks and writes: `thinker_config`.

    Args:
        position_id_per_seconds: positions of a second of video.

    Raises:
        ValueError: parts that do not fit each other.
    """

    audio: AudioConfig
    vision: VisionConfig
    text: DecoderConfig
    audio_token_id: int
    image_token_id: int
    video_token_id: int
    audio_start_token_id: int
    audio_end_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    position_id_per_seconds: float

    def __post_init__(self) -> None:
        check_numbers(vars(self), ("position_id_per_seconds",))
        _check_ids(vars(self), self.text.vocab_size, "text_config.vocab_size")
        size = "text_config.hidden_size", self.text.hidden_size
        _check_same("audio_config.output_dim", self.audio.output_dim, *size)
        _check_same("vision_config.out_hidden_size", self.vision.out_hidden_size, *size)
        if self.text.mrope_section is None:
            raise ValueError("text_config.rope_scaling.mrope_section is missing")
        if self.deepstack > self.text.num_hidden_layers:
            raise ValueError(
                f"vision_config.deepstack_visual_indexes has {self.deepstack} layers, and the "
                f"decoder has {self.text.num_hidden_layers}"
            )

    @property
    def deepstack(self) -> int:
        """Layers of the decoder after which features of images are added."""
        return len(self.vision.deepstack_visual_indexes)

    @property
    def media_ids(self) -> tuple[int, int, int]:
        """The ids that stand for tokens of sounds, images and videos."""
        return self.audio_token_id, self.image_token_id, self.video_token_id

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ThinkerConfig:
        """Read a `thinker_config`."""
        parts = {
            "audio": _part(config, "audio_config", AudioConfig.from_dict),
            "vision": _part(config, "vision_config", VisionConfig.from_dict),
            "text": _part(config, "text_config", DecoderConfig.from_dict),
        }
        return made(cls, {**config, **parts})


@dataclass(frozen=True)
class TalkerConfig:
    """What speaks, in codes: `talker_config`.

    Args:
        text: its decoder.
        code_predictor: what completes a frame of codes.
        accept_hidden_layer: after how many of the Thinker's layers hidden states are taken.
        speaker_id: id of every voice, by its name in lower case.

    Raises:
        ValueError: parts that do not fit each other.
    """

    text: DecoderConfig
    code_predictor: DecoderConfig
    thinker_hidden_size: int
    accept_hidden_layer: int
    num_code_groups: int
    codec_pad_id: int
    codec_bos_id: int
    codec_eos_token_id: int
    codec_nothink_id: int
    codec_think_bos_id: int
    codec_think_eos_id: int
    speaker_id: Mapping[str, int]

    def __post_init__(self) -> None:
        check_sizes(vars(self), ("thinker_hidden_size", "accept_hidden_layer", "num_code_groups"))
        _check_ids(vars(self), self.text.vocab_size, "text_config.vocab_size")
        voices = self.speaker_id
        if not isinstance(voices, Mapping) or not voices:
            raise ValueError(f"speaker_id={voices!r}: must name at least one voice")
        _check_ids(
            {f"speaker_id.{n}_id": i for n, i in voices.items()}, self.text.vocab_size, "vocab_size"
        )
        if self.num_code_groups < 2:
            raise ValueError("num_code_groups=1: must be 2 or more")
        size = "text_config.hidden_size", self.text.hidden_size
        _check_same("code_predictor_config.hidden_size", self.code_predictor.hidden_size, *size)
        if self.code_predictor.num_experts or self.code_predictor.mrope_section is not None:
            raise ValueError("code_predictor_config: must be a plain decoder")
        if self.text.mrope_section is None:
            raise ValueError("text_config.rope_scaling.mrope_section is missing")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TalkerConfig:
        """Read a `talker_config`."""
        predictor = object_of(config, "code_predictor_config")
        check_values(predictor, num_code_groups=config.get("num_code_groups"))
        parts = {
            "text": _part(config, "text_config", DecoderConfig.from_dict),
            "code_predictor": _part(config, "code_predictor_config", DecoderConfig.from_dict),
        }
        return made(cls, {**config, **parts})


@dataclass(frozen=True)
class OmniConfig:
    """The whole model.

    Args:
        talker, vocoder: `None` in checkpoints that only write.

    Raises:
        ValueError: parts that do not fit each other.
    """

    thinker: ThinkerConfig
    im_start_token_id: int
    im_end_token_id: int
    user_token_id: int
    assistant_token_id: int
    tts_pad_token_id: int
    tts_bos_token_id: int
    tts_eos_token_id: int
    talker: TalkerConfig | None = None
    vocoder: VocoderConfig | None = None

    def __post_init__(self) -> None:
        _check_ids(vars(self), self.thinker.text.vocab_size, "text_config.vocab_size")
        if self.talker is None:
            return
        text, talker, vocoder = self.thinker.text, self.talker, self.vocoder
        size = "thinker_config.text_config.hidden_size", text.hidden_size
        _check_same("talker_config.thinker_hidden_size", talker.thinker_hidden_size, *size)
        groups = "talker_config.num_code_groups", talker.num_code_groups
        _check_same("code2wav_config.num_quantizers", vocoder.num_quantizers, *groups)
        size = "code_predictor_config.vocab_size", talker.code_predictor.vocab_size
        _check_same("code2wav_config.codebook_size", vocoder.codebook_size, *size)
        if talker.accept_hidden_layer > text.num_hidden_layers:
            raise ValueError(
                f"talker_config.accept_hidden_layer={talker.accept_hidden_layer}: the Thinker has "
                f"{text.num_hidden_layers} layers"
            )

    def silent(self) -> OmniConfig:
        """The same without what speaks."""
        return replace(self, talker=None, vocoder=None)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> OmniConfig:
        """Read a config.json.

        Raises:
            ValueError: it describes another kind of model, or none.
        """
        required(config, ("model_type", "thinker_config"))
        check_values(config, model_type="qwen3_omni_moe")
        speaks = {"enable_audio_output": True, **config}
        check_flags(speaks, ["enable_audio_output"])
        parts = {"thinker": _part(config, "thinker_config", ThinkerConfig.from_dict)}
        if speaks["enable_audio_output"]:
            required(config, ("talker_config", "code2wav_config"))
            parts["talker"] = _part(config, "talker_config", TalkerConfig.from_dict)
            parts["vocoder"] = _part(config, "code2wav_config", VocoderConfig.from_dict)
        return made(cls, {**config, **parts})

    @classmethod
    def from_file(cls, path: str | Path) -> OmniConfig:
        """Read the config.json at `path`.

        Raises:
            OSError: it cannot be read.
            ValueError: it describes another kind of model, or none.
        """
        return cls.from_dict(read_object(path))


def _check_same(name: str, value: int, other: str, wanted: int) -> None:
    if value != wanted:
        raise ValueError(f"{name}={value}: must be the {wanted} of {other}")


def _check_ids(values: Mapping[str, Any], size: int, what: str) -> None:
    for name, value in values.items():
        if not name.endswith("_id") or isinstance(value, Mapping):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
            raise ValueError(f"{name}={value!r}: must be an id below {what}={size}")


def _part(config: Mapping[str, Any], name: str, read: Callable[[Mapping[str, Any]], _T]) -> _T:
    """What `read` makes of an entry; its errors say where the fault is."""
    try:
        return read(object_of(config, name))
    except ValueError as error:
        text = str(error)
        link = ": " if text.startswith("it ") else "."
        raise ValueError(text if text.startswith(name) else f"{name}{link}{text}") from error
