"""What callers give a world model, checked in their thread: frames, goals, actions, states.

Whatever is missing, or does not fit, raises InvalidRequest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mstar.errors import InvalidRequest
from mstar.io.data_url import decode_data_url
from mstar.io.rgb import rgb_of, shown
from mstar.models.arrays import array
from mstar.models.parameters import demand
from mstar.models.vjepa2.ac_config import EXTRINSICS, AcConfig
from mstar.models.vjepa2.latents import Latents, latents_of
from mstar.models.vjepa2.poses import trajectory
from mstar.models.vjepa2.preprocess import squares
from mstar.models.vjepa2.requests import frames_of

__all__ = [
    "Course",
    "check_frames",
    "course",
    "extrinsics_of",
    "goal_of",
    "paired",
    "rows",
    "seen_of",
]


@dataclass(frozen=True, eq=False)
class Course:
    """What candidates do, from the last frame that was seen.

    Args:
        past_actions, past_states: of the frames before that, float32 `[frames, 7]`.
        actions: float32 `[samples, horizon, 7]`.
        states: before each action, and after the last one where that is known, float32
            `[samples, horizon (+ 1), 7]`.
        together: whether all samples begin with the same state.
    """

    past_actions: Tensor
    past_states: Tensor
    actions: Tensor
    states: Tensor
    together: bool


def seen_of(field: str, value: Any, config: AcConfig) -> Tensor:
    """Frames uint8, or latents `[frames, patches, embed_dim]`, whichever was given."""
    demand(value is not None, field, None, "must be given: an image, a video, or latents")
    kind = "float32" if isinstance(value, Latents) else str(getattr(value, "dtype", ""))
    if "float" not in kind and not _nested(value):
        return frames_of(field, value, squares)
    found, patches, width = latents_of(field, value), config.patches, config.embed_dim
    whole = found.ndim == 2 or (found.ndim == 3 and (len(found) == 1 or found.shape[1] == patches))
    good = whole and found.numel() and found.shape[-1] == width
    demand(
        good and found[..., 0].numel() % patches == 0,
        field,
        f"array {tuple(found.shape)}",
        f"must be latents [frames, {patches}, {width}] or [tokens, {width}]",
    )
    return found.reshape(-1, patches, width)


def goal_of(field: str, value: Any, config: AcConfig) -> Tensor:
    """A goal: frames or latents; see `seen_of`. Strings are data URLs, since clients of a server
    must not name its files: a file is a `pathlib.Path`, or bytes. Lists of pixels are arrays."""
    if isinstance(value, str):
        allowed = "a string must be a data URL; a file may go into images, beside the video"
        demand(value.startswith("data:"), field, value[:80], allowed)
        value = decode_data_url(field, value)
    if field != "goal_image":
        return seen_of(field, value, config)
    try:
        if isinstance(value, list):
            numbers = np.array(value)
            if numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() > 255:
                raise ValueError("must be pixels, integers from 0 to 255")
            value = numbers.astype(np.uint8)
        return squares([rgb_of(value)])
    except ValueError as error:
        raise InvalidRequest(field, shown(value), str(error)) from None


def course(actions: Tensor, states: Tensor, seen: int, horizon: int) -> Course:
    """Split rows `[samples, T, 7]` at the last frame that was seen.

    Args:
        actions: for every frame that was seen and every step.
        states: likewise, or for the frames that were seen: then the others follow.
        seen: frames.
        horizon: steps.
    """
    past, total = seen - 1, seen - 1 + horizon
    count, known = actions.shape[1], states.shape[1]
    told = f"must be {total} for {seen} frames and {horizon} steps"
    demand(count >= total, "actions", f"{count} rows", told)
    told = f"must be {total}, or {seen} from which the others follow"
    demand(known >= total or known == seen, "states", f"{known} rows", told)
    counts = {len(actions), len(states)} - {1}
    told = f"must be for as many candidates as actions: {len(actions)}"
    demand(len(counts) <= 1, "states", f"{len(states)} candidates", told)
    for field, given in (("actions", actions), ("states", states)):
        same = bool((given[:, :past] == given[:1, :past]).all())
        demand(same, field, "differ", "must be the same in frames that were seen")
    future = actions[:, past:total].expand(max(counts, default=1), -1, -1)
    if known < total:
        after = trajectory(states[:, past], future)
    else:
        after = states[:, past : total + 1].expand(len(future), -1, -1)
    together = bool((states[:, past] == states[:1, past]).all())
    return Course(actions[0, :past], states[0, :past], future, after, together)


def paired(actions: Any, states: Any, frames: int) -> tuple[Tensor, Tensor]:
    """One action and one state for every frame, float32 `[samples, frames, 7]`."""
    moves = {"actions": rows("actions", actions), "states": rows("states", states)}
    samples = max(map(len, moves.values()))
    for field, given in moves.items():
        count, each = given.shape[:2]
        demand(each == frames, field, f"{each} rows", f"must be {frames}, one a frame")
        demand(count in (1, samples), field, f"{count} candidates", f"must be {samples}, or one")
    return moves["actions"].expand(samples, -1, -1), moves["states"].expand(samples, -1, -1)


def check_frames(field: str, value: Any, frames: int, config: AcConfig) -> None:
    """Refuse more frames than the predictor knows, of which `value` is the cause."""
    allowed = f"needs {frames} frames; the model knows {config.max_frames}"
    demand(frames <= config.max_frames, field, value, allowed)


def rows(field: str, value: Any, width: int = 7) -> Tensor:
    """Float32 `[samples, T, width]` of `[samples, T, width]`, `[T, width]` or `[width]`."""
    demand(value is not None, field, None, f"must be given: rows of {width} numbers")
    try:
        found = array(value).astype(np.float32)
    except ValueError as error:
        raise InvalidRequest(field, value, str(error)) from None
    good = found.ndim in (1, 2, 3) and found.shape[-1] == width
    demand(good, field, f"array {found.shape}", f"must be [T, {width}] or [samples, T, {width}]")
    return torch.from_numpy(found.reshape((1,) * (3 - found.ndim) + found.shape))


def extrinsics_of(value: Any, config: AcConfig, frames: int) -> Tensor | None:
    """Where the camera is in every frame, float32 `[frames, 6]`; None for models without."""
    if not config.use_extrinsics:
        demand(value is None, "extrinsics", "given", "this model has no use for them")
        return None
    found = rows("extrinsics", value, EXTRINSICS)[0]
    told = f"must have {frames}, one a frame"
    demand(len(found) >= frames, "extrinsics", f"{len(found)} rows", told)
    return found[:frames]


def _nested(value: Any) -> bool:
    """Whether it is numbers in lists, as JSON has latents."""
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, float)
