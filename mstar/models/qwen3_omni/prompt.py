"""The prompt of a conversation: text with marks and roles, and media at their places in it.

    segments = lay_out(turns, media, tokenizer, config)

`turns` hold what was said, and `media` how large the encoders make every part that is none of text.
The result is a list of segments, each with its ids and its positions on three axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.models.qwen3_omni.config import ThinkerConfig
from mstar.models.qwen3_omni.positions import (
    counted,
    interleaving,
    of_video_with_sound,
    of_vision,
)
from mstar.models.qwen3_omni.tokenizer import Tokenizer
from mstar.models.qwen3_omni.vision import Grid
from mstar.models.turns import Turn

__all__ = [
    *("Heard", "Media", "Pictured", "Segment"),
    *("chat_pieces", "lay_out", "lay_out_pieces", "next_position"),
]

_SOUND = ("<|audio_start|>", "<|audio_end|>")
_VISION = ("<|vision_start|>", "<|vision_end|>")
_NO_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Heard:
    """A sound: `tokens` of it."""

    tokens: int


@dataclass(frozen=True)
class Pictured:
    """An image or a video.

    Args:
        grid: its patches.
        seconds: from one time of the grid to the next; `None` for an image.
        sounds: tokens of the sound of a video that is heard while it is seen.
    """

    grid: Grid
    seconds: float | None = None
    sounds: int = 0


Media = Heard | Pictured


@dataclass(frozen=True, eq=False)
class Segment:
    """A segment of a prompt: text, or what stands for one medium.

    Args:
        ids: of its tokens.
        positions: float32 `[3, tokens]`.
        medium: `None` for text.
        is_video: bool `[tokens]`, where a video's tokens are among those of its sound; else `None`.
    """

    ids: list[int]
    positions: Tensor
    medium: Media | None = None
    is_video: Tensor | None = None


def chat_pieces(
    turns: Sequence[Turn], media: Sequence[Media], *, enable_thinking: bool = True
) -> Iterator[str | Media]:
    """Text with its marks, and media, in order: the published chat template.

    Args:
        media: for every part that is no text, in order.
        enable_thinking: false lets the answer begin after an empty thought.
    """
    left = iter(media)
    text = ""
    for turn in turns:
        text += f"<|im_start|>{turn.role}\n"
        for part in turn.parts:
            if part.kind == "text":
                text += part.value
                continue
            medium = next(left)
            before, after = marks_of(medium)
            yield text + before
            yield medium
            text = after
        text += "<|im_end|>\n"
    yield text + "<|im_start|>assistant\n" + ("" if enable_thinking else _NO_THOUGHT)


def marks_of(medium: Media) -> tuple[str, str]:
    """The marks before and after a medium."""
    if isinstance(medium, Heard):
        return _SOUND
    if medium.sounds:
        return _VISION[0] + _SOUND[0], _SOUND[1] + _VISION[1]
    return _VISION


def lay_out(
    turns: Sequence[Turn],
    media: Sequence[Media],
    tokenizer: Tokenizer,
    config: ThinkerConfig,
    *,
    enable_thinking: bool = True,
) -> list[Segment]:
    """The segments of a conversation up to where the answer begins; see `chat_pieces`."""
    pieces = chat_pieces(turns, media, enable_thinking=enable_thinking)
    found: list[list[int] | Media] = [
        tokenizer.encode(piece) if isinstance(piece, str) else piece for piece in pieces
    ]
    return lay_out_pieces(found, config)


def lay_out_pieces(
    pieces: Sequence[list[int] | Media], config: ThinkerConfig, start: float = 0.0
) -> list[Segment]:
    """The segments of ids and media, from position `start` on."""
    segments = []
    for piece in pieces:
        if isinstance(piece, list):
            positions, start = counted(start, len(piece))
            segments.append(Segment(piece, positions))
        else:
            segment, start = _of_medium(piece, config, start)
            segments.append(segment)
    return segments


def next_position(segments: Sequence[Segment]) -> float:
    """Where the answer goes on: after the largest position on any axis. What follows a video with
    a short sound may count from less than its height or width."""
    return max(float(segment.positions.max()) for segment in segments) + 1.0


def _of_medium(medium: Media, config: ThinkerConfig, start: float) -> tuple[Segment, float]:
    if isinstance(medium, Heard):
        positions, end = counted(start, medium.tokens)
        return Segment([config.audio_token_id] * medium.tokens, positions, medium), end
    token = config.image_token_id if medium.seconds is None else config.video_token_id
    args = (
        medium.grid,
        config.vision.spatial_merge_size,
        medium.seconds or 0.0,
        config.position_id_per_seconds,
    )
    if not medium.sounds:
        positions, end = of_vision(start, *args)
        return Segment([token] * positions.shape[1], positions, medium), end
    positions, end = of_video_with_sound(start, *args, medium.sounds)
    is_video = interleaving(*args, medium.sounds)
    ids = torch.where(is_video, token, config.audio_token_id).tolist()
    return Segment(ids, positions, medium, is_video), end
