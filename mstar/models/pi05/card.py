"""The card of pi0.5: observations of a robot and a task in words to a chunk of its actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mstar.models.arrays import array, rows
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters, demand
from mstar.models.pi05.config import SCHEDULES

__all__ = ["CARD"]


def _together(values: dict[str, Any]) -> None:
    delay = values["inference_delay"]
    together = delay is None or values["prev_chunk_left_over"] is not None
    demand(together, "inference_delay", delay, "goes with prev_chunk_left_over")


PARAMETERS = Parameters(
    "pi05",
    [
        Parameter(
            "robot_state",
            array,
            accepts="the robot's state: numbers, in its own units",
            help="joints, grippers: as many numbers as the policy was trained with",
        ),
        Parameter(
            "num_steps",
            int,
            low=1,
            high=1000,
            aliases=("num_inference_steps",),
            help="steps of the flow; by default those of the checkpoint, 10 as published",
        ),
        Parameter(
            "noise",
            array,
            accepts="an array [horizon, 32] of start noise",
            help="start noise instead of that of the seed",
        ),
        Parameter(
            "seed", int, low=0, high=2**63 - 1, help="same seed, same observation: same actions"
        ),
        Parameter(
            "raw", bool, False, help="actions in the model's normalised space, not in robot units"
        ),
        Parameter(
            "prev_chunk_left_over",
            rows,
            accepts="an array [rows, action_dim]: what is left of the last chunk, normalised",
            help="real-time chunking: go on where the last chunk is",
        ),
        Parameter("inference_delay", int, low=0, help="control steps until the chunk arrives"),
        Parameter(
            "execution_horizon",
            int,
            low=1,
            help="rows of a chunk that guidance reaches; by default the checkpoint's, 10 as "
            "published",
        ),
        Parameter(
            "rtc_mode",
            str,
            choices=("guided", "trained"),
            help="by default trained where the checkpoint was trained for it",
        ),
        Parameter(
            "prefix_attention_schedule",
            str,
            choices=SCHEDULES,
            help="how guidance falls off between the delay and the execution horizon; by default "
            "the checkpoint's, LINEAR as published",
        ),
        Parameter(
            "max_guidance_weight",
            float,
            low=0,
            high=1000,
            help="largest gain of the guidance; by default the checkpoint's, 10 as published",
        ),
    ],
    check=_together,
)


CARD = ModelCard(
    name="pi05",
    title="pi0.5: camera images, state and a task to robot actions",
    entry="mstar.models.pi05.model:Pi05",
    inputs=("text", "image"),
    outputs=("action",),
    parameters=PARAMETERS,
    repos={"pi05": "lerobot/pi05_base"},
    tiny=Path(__file__).parent / "tiny",
    full=Path(__file__).parent / "full",
    recognises=lambda config: config.get("type") == "pi05",
)
