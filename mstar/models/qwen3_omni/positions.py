"""Positions of the tokens of a prompt on three axes: time, height, width.

Text counts on all of them alike. Images spread over height and width at one time; videos go on in
time, `position_id_per_seconds` a second, which may give fractions. Whatever follows a medium begins
after the largest position in it (Qwen2-VL, arXiv 2409.12191, section 2.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.models.qwen3_omni.vision import Grid

__all__ = ["counted", "interleaving", "of_video_with_sound", "of_vision", "offset_of"]


def counted(start: float, count: int) -> tuple[Tensor, float]:
    """Positions float32 `[3, count]` of text or sound from `start` on, and what follows them."""
    places = torch.arange(count, dtype=torch.float32) + start
    return places.expand(3, -1), start + count


def of_vision(
    start: float, grid: Grid, merge: int, seconds: float = 0.0, rate: float = 0.0
) -> tuple[Tensor, float]:
    """Positions float32 `[3, tokens]` of an image or a video, and what follows them.

    Args:
        grid: patches.
        merge: patches of a token along each side.
        seconds: from one time to the next.
        rate: positions of a second.
    """
    rows, columns = grid.height // merge, grid.width // merge
    # In float32 and in this order, which decides what of a video comes before what of its sound.
    times = torch.arange(grid.times).float() * seconds * rate
    shape = grid.times, rows, columns
    places = torch.stack(
        [
            times[:, None, None].expand(shape),
            torch.arange(rows).float()[:, None].expand(shape),
            torch.arange(columns).float().expand(shape),
        ]
    ).flatten(1)
    places = places + start
    return places, _after(places)


def interleaving(grid: Grid, merge: int, seconds: float, rate: float, sounds: int) -> Tensor:
    """The order of a video's tokens and those of its sound, by time: bool, true for the video's.

    Args:
        sounds: tokens of the sound.
    """
    times = of_vision(0.0, grid, merge, seconds, rate)[0][0]
    both = torch.cat([times, torch.arange(sounds, dtype=torch.float32)])
    order = both.sort(stable=True).indices  # the video comes first where times are equal
    return order < len(times)


def of_video_with_sound(
    start: float, grid: Grid, merge: int, seconds: float, rate: float, sounds: int
) -> tuple[Tensor, float]:
    """Positions float32 `[3, tokens]` of a video and its sound, interleaved, and what follows.

    Both begin at `start`. What follows begins after the tokens of whichever of the two is left when
    the other has ended, as published.
    """
    seen, _ = of_vision(start, grid, merge, seconds, rate)
    heard, _ = counted(start, sounds)
    is_video = interleaving(grid, merge, seconds, rate, sounds)
    places = torch.empty(3, len(is_video))
    places[:, is_video], places[:, ~is_video] = seen, heard
    last = is_video[-1]
    others = (is_video != last).nonzero()
    rest = places[:, int(others[-1]) + 1 :] if len(others) else places
    return places, _after(rest)


def offset_of(position: float, length: int) -> float:
    """What the next position is beyond the `length` of a sequence; an integer if it is whole."""
    offset = position - length
    return int(offset) if offset == int(offset) else offset


def _after(places: Tensor) -> float:
    return float(places.max()) + 1.0
