"""The card of BAGEL: chats, sees, draws and edits; one decoder with two experts per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mstar.models.arrays import rows
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters, demand, plain
from mstar.models.sampling_table import is_list, sampling_table

__all__ = ["CARD", "MOST_TOKENS", "OF_IMAGES", "OF_TEXT", "PARAMETERS", "RENORM_TYPES"]

MOST_TOKENS = 1024
RENORM_TYPES = ("global", "channel", "text_channel")


def interval(value: Any) -> tuple[float, float]:
    """`cfg_interval`: the part of the timesteps, from 1 down to 0, in which guidance is on."""
    ends = [plain(end) for end in value] if is_list(value) else []
    numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not numbers or not 0 <= ends[0] <= ends[1] <= 1:
        raise ValueError("must be two numbers as a list, [low, high], 0 <= low <= high <= 1")
    return float(ends[0]), float(ends[1])


def array(value: Any) -> np.ndarray:
    """An array of finite float32 numbers, from an array or nested lists."""
    found = rows(value).astype(np.float32)
    if found.ndim < 2:
        raise ValueError("must be an array of numbers with at least two dimensions")
    return found


def arrays(value: Any) -> list[np.ndarray]:
    """`vae_noise`: one array `[channels, height, width]` for each image of the input."""
    try:
        found = array(value)
    except ValueError:  # images of several sizes
        if not isinstance(value, (list, tuple)):
            raise
        return [array(item) for item in value]
    return list(found) if found.ndim > 3 else [found]


def _together(values: dict[str, Any]) -> None:
    least, most = values["min_tokens"], values["max_output_tokens"]
    fits = most is None or least <= most
    demand(fits, "min_tokens", least, f"must not exceed max_output_tokens={most}")
    count, alone = values["num_images"], values["latents"] is None or values["num_images"] == 1
    demand(alone, "latents", "given", f"go with num_images=1, not {count}")


_TEXT = [
    *sampling_table(temperature=0.0, what="text (greedy by default, as published)"),
    Parameter(
        "max_output_tokens",
        int,
        low=1,
        high=32768,
        aliases=("max_tokens", "max_new_tokens"),
        help=f"longest answer; null is {MOST_TOKENS}, or what there is room for",
    ),
    Parameter(
        "max_think_tokens",
        int,
        1000,
        low=2,
        high=32768,
        aliases=("max_think_token_n",),
        help="longest thought before an image, its start token included",
    ),
]

_IMAGE = [
    Parameter("width", int, low=1, help="pixels; by default as the last input image, or 1024"),
    Parameter("height", int, low=1, help="of the image in pixels"),
    Parameter("num_images", int, 1, low=1, high=16, help="images from noise that follows on"),
    Parameter(
        "num_timesteps",
        int,
        50,
        low=2,
        high=1000,
        aliases=("num_inference_steps",),
        help="points of the flow's time grid; one step fewer is taken",
    ),
    Parameter(
        "timestep_shift",
        float,
        3.0,
        low=0,
        low_open=True,
        high=100,
        help="above 1, more of the steps are near noise",
    ),
    Parameter(
        "cfg_text_scale",
        float,
        4.0,
        low=0,
        high=100,
        aliases=("guidance_scale",),
        help="how strongly the text guides; up to 1 not at all",
    ),
    Parameter(
        "cfg_img_scale",
        float,
        low=0,
        high=100,
        help="how strongly images guide, where text does; by default 1.5, in an edit 2",
    ),
    Parameter(
        "cfg_interval",
        interval,
        accepts="two numbers as a list, [low, high], with 0 <= low <= high <= 1",
        help="timesteps that are guided; by default [0.4, 1], in an edit [0, 1]",
    ),
    Parameter(
        "cfg_renorm_type",
        str,
        choices=RENORM_TYPES,
        help="keeps guidance from oversaturating; by default global, in an edit text_channel",
    ),
    Parameter(
        "cfg_renorm_min", float, 0.0, low=0, high=1, help="least factor of it; 1 turns it off"
    ),
    Parameter("negative_prompt", str, help="text that guidance leads away from"),
    Parameter(
        "latents",
        array,
        accepts="an array [tokens, patch dim] of start noise",
        help="start noise instead of that of the seed",
    ),
    Parameter(
        "vae_noise",
        arrays,
        accepts="an array [channels, height / 8, width / 8], or a list of those, one per image",
        help="noise of the encoded input images instead of that of the seed",
    ),
    Parameter(
        "enable_taylorseer", bool, False, help="guess two of three steps: faster, less exact"
    ),
    Parameter("progress", bool, False, help="an event after every step"),
    Parameter("preview_every", int, 0, low=0, help="steps from preview to preview; 0 for none"),
]

PARAMETERS = Parameters(
    "bagel",
    [
        *_TEXT,
        Parameter(
            "think",
            bool,
            help="think aloud first; by default only where text and an image are asked for",
        ),
        *_IMAGE,
        Parameter(
            "seed",
            int,
            low=0,
            high=2**63 - 1,
            help="same seed and request: same output, up to a colour's last level here and there",
        ),
    ],
    check=_together,
)


# What only text, a thought before an image included, or only images have a use for.
OF_TEXT = tuple(parameter.name for parameter in _TEXT)
OF_IMAGES = tuple(parameter.name for parameter in _IMAGE)


CARD = ModelCard(
    name="bagel",
    title="BAGEL 7B-MoT: chats, sees, draws and edits images",
    entry="mstar.models.bagel.model:Bagel",
    inputs=("text", "image"),
    outputs=("text", "image"),
    parameters=PARAMETERS,
    repos={"bagel": "ByteDance-Seed/BAGEL-7B-MoT"},
    tiny=Path(__file__).parent / "tiny",
    full=Path(__file__).parent / "full",
    chat=True,
)
