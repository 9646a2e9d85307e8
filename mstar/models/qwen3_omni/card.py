"""The card of Qwen3-Omni: reads, looks, listens, watches; writes and speaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters, demand
from mstar.models.sampling_table import sampling_table

__all__ = ["CARD", "MOST_FRAMES", "MOST_TOKENS", "PARAMETERS"]

MOST_TOKENS = 1024  # of an answer, where the user sets no limit
MOST_FRAMES = 4096  # of speech, likewise: five and a half minutes
_CONTEXT = 65536
_LARGEST = 1 << 26  # pixels
# Of the table that text models share, what codes of speech have a use for.
_OF_SPEECH = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens")


def _thinker() -> list[Parameter]:
    """Parameters of the text; `thinker_` may stand before each name."""
    return [
        *(
            replace(parameter, aliases=(f"thinker_{parameter.name}",))
            for parameter in sampling_table(temperature=0.0, what="text (greedy, as published)")
        ),
        Parameter(
            "max_output_tokens",
            int,
            low=1,
            high=_CONTEXT,
            aliases=(
                *("max_tokens", "max_new_tokens", "thinker_max_output_tokens"),
                *("thinker_max_tokens", "thinker_max_new_tokens"),
            ),
            help=f"longest answer; null means {MOST_TOKENS}, or as many as there is room for",
        ),
    ]


def _speech(prefix: str, *names: str, **defaults: Any) -> list[Parameter]:
    table = sampling_table(prefix, **defaults)
    return [parameter for parameter in table if parameter.name.removeprefix(prefix) in names]


def _predictor() -> list[Parameter]:
    table = _speech(
        "code_predictor_",
        *("temperature", "top_p", "top_k"),
        temperature=1.0,
        top_p=0.8,
        top_k=50,
        what="the other codes of a frame",
    )
    temperature = replace(
        table[0],
        default=None,
        help="spread of the sampling of the other codes of a frame; null means 1, or 0 where "
        "talker_temperature is 0",
    )
    return [temperature, *table[1:]]


def _pixels(prefix: str, what: str, least: int, most: int) -> list[Parameter]:
    return [
        Parameter(
            f"{prefix}{end}_pixels",
            int,
            default,
            low=1,
            high=_LARGEST,
            help=f"{what} with {side} are {change}",
        )
        for end, default, side, change in (
            ("min", least, "fewer pixels", "enlarged"),
            ("max", most, "more", "shrunk"),
        )
    ]


def _together(values: dict[str, Any]) -> None:
    for low, high in (
        ("min_tokens", "max_output_tokens"),
        ("talker_min_tokens", "talker_max_tokens"),
        ("min_frames", "max_frames"),
        ("min_pixels", "max_pixels"),
        ("video_min_pixels", "video_max_pixels"),
    ):
        least, most = values[low], values[high]
        demand(most is None or least <= most, low, least, f"must not exceed {high}={most}")


PARAMETERS = Parameters(
    "qwen3_omni",
    [
        *_thinker(),
        Parameter("system", str, help="the system prompt; there is none by default"),
        Parameter(
            "enable_thinking",
            bool,
            True,
            help="false begins the answer after an empty thought; for checkpoints that think",
        ),
        Parameter(
            "voice",
            str,
            "Ethan",
            aliases=("speaker",),
            help="who speaks: Ethan, Chelsie or Aiden, in whichever case",
        ),
        Parameter(
            "read_aloud",
            bool,
            help="speak the given text instead of an answer to it; by default where a text alone "
            "is given and audio alone is asked for",
        ),
        *_speech(
            "talker_",
            *_OF_SPEECH,
            temperature=0.9,
            top_k=50,
            repetition_penalty=1.05,
            what="speech",
        ),
        Parameter(
            "talker_max_tokens",
            int,
            low=1,
            high=_CONTEXT,
            aliases=("talker_max_new_tokens", "talker_max_output_tokens"),
            help="longest speech in frames, 12.5 a second, the end counted; null means "
            f"{MOST_FRAMES}, or as many as there is room for",
        ),
        *_predictor(),
        Parameter("use_audio_in_video", bool, False, help="listen to the sound of videos, too"),
        Parameter(
            "fps",
            float,
            2.0,
            low=0,
            low_open=True,
            high=1000,
            aliases=("video_fps",),
            help="frames of a second of video that are seen; of an array or images, that it has",
        ),
        Parameter(
            "min_frames",
            int,
            4,
            low=1,
            high=_CONTEXT,
            aliases=("video_min_frames",),
            help="frames of a video that are seen at least, if it has as many",
        ),
        Parameter(
            "max_frames",
            int,
            768,
            low=1,
            high=_CONTEXT,
            aliases=("video_max_frames",),
            help="frames of a video that are seen at most",
        ),
        *_pixels("", "images", 3136, 12_845_056),
        *_pixels("video_", "frames of videos", 128 * 32 * 32, 768 * 32 * 32),
        Parameter(
            "seed",
            int,
            low=0,
            high=2**63 - 1,
            help="same seed, same request: same text and speech",
        ),
    ],
    check=_together,
)


def _recognises(config: dict[str, Any]) -> bool:
    return config.get("model_type") == "qwen3_omni_moe"


_REPO = "Qwen/Qwen3-Omni-30B-A3B-{}"

CARD = ModelCard(
    name="qwen3_omni",
    title="Qwen3-Omni 30B-A3B: reads, looks, listens, watches; writes and speaks",
    entry="mstar.models.qwen3_omni.model:Qwen3Omni",
    inputs=("text", "image", "audio", "video"),
    outputs=("text", "audio"),
    parameters=PARAMETERS,
    repos={"qwen3_omni": _REPO.format("Instruct")},
    aliases=(_REPO.format("Thinking"), _REPO.format("Captioner")),
    tiny=Path(__file__).parent / "tiny",
    full=Path(__file__).parent / "full",
    chat=True,
    recognises=_recognises,
)
