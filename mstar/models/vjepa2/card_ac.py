"""The card of V-JEPA 2-AC: what a robot sees and does to what it will see, and to plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mstar.models.arrays import array
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters, demand
from mstar.models.vjepa2.card import NUM_FRAMES, STREAM

__all__ = ["CARD", "PLANNING"]


def _axis(value: Any) -> dict[int, float]:
    """`{index: value}`; JSON has strings as keys."""
    try:
        found = {int(index): float(number) for index, number in value.items()}
    except (AttributeError, ValueError):
        found = {-1: 0.0}
    if not all(index in range(4) and abs(number) < 1e9 for index, number in found.items()):
        raise ValueError  # in the words of the parameter
    return found


def _together(values: dict[str, Any]) -> None:
    topk, samples = values["topk"], values["samples"]
    demand(topk <= samples, "topk", topk, f"must be from 2 to the {samples} samples")


def _anything(value: Any) -> Any:
    return value


_ROWS = {"accepts": "rows of 7 numbers, [T, 7] or [candidates, T, 7]"}
_SHARE = {"low": 0, "high": 1}
_PLANNING = [
    Parameter("samples", int, 400, low=2, high=100_000, help="candidates of an iteration"),
    Parameter("horizon", int, 2, low=1, help="actions of a plan"),
    Parameter("iterations", int, 10, low=1, high=10**6, help="of the search"),
    Parameter("topk", int, 10, low=2, help="the best candidates, of which the next are made"),
    Parameter("maxnorm", float, 0.05, low=0, low_open=True, high=10, help="metres along x, y, z"),
    Parameter("momentum_mean", float, 0.15, help="how much of the last mean stays", **_SHARE),
    Parameter("momentum_std", float, 0.15, help="how much of the last deviation stays", **_SHARE),
    Parameter("momentum_mean_gripper", float, 0.15, help="likewise, of the gripper", **_SHARE),
    Parameter("momentum_std_gripper", float, 0.15, help="likewise, of the gripper", **_SHARE),
    Parameter(
        "axis",
        _axis,
        accepts="an object of 0, 1, 2 (x, y, z) or 3 (gripper) to a number",
        help="what an action's numbers are held to",
    ),
    Parameter("close_gripper", int, low=0, help="the action from which the gripper closes"),
    Parameter(
        "noise",
        array,
        accepts="an array [iterations, horizon, samples, 4]",
        help="instead of that of the seed",
    ),
    Parameter("seed", int, low=0, high=2**63 - 1, help="same seed, same plan"),
    Parameter(
        "budget_ms",
        float,
        low=0,
        low_open=True,
        high=1e9,
        help="milliseconds, after which the best plan so far is taken",
    ),
    Parameter("cost", str, "l1", choices=("l1", "l2", "cosine"), help="how far from the goal"),
]
PLANNING = Parameters("plan", _PLANNING, check=_together)  # of `Engine.plan`

PARAMETERS = Parameters(
    "vjepa2_ac",
    [
        NUM_FRAMES,
        Parameter("skip_predictor", bool, False, help="the encoder's latents alone"),
        Parameter(
            "clip",
            str,
            choices=("natural", "frames"),
            help="encode one clip, or each frame by itself; by default as there are actions for",
        ),
        Parameter("actions", array, help="changes of pose, one a frame", **_ROWS),
        Parameter("states", array, help="poses: x y z, roll pitch yaw, gripper", **_ROWS),
        Parameter("extrinsics", array, accepts="rows of 6 numbers", help="where the camera is"),
        Parameter(
            "rollout_horizon", int, 0, low=0, help="steps into the future; with mpc, before scoring"
        ),
        STREAM,
        Parameter("context_frames", int, 1, low=1, help="frames that a rollout begins with"),
        Parameter("mpc", bool, False, help="score candidates by how near they come to the goal"),
        Parameter("plan", bool, False, help="search for actions that lead to the goal"),
        Parameter(
            "goal_image",
            _anything,
            accepts="an image: bytes, a pathlib.Path, an array, lists of pixels, or a data URL",
            help="how it is to look; images beside a video are the same",
        ),
        Parameter(
            "goal_hidden",
            _anything,
            accepts="latents [tokens, dim] or [1, tokens, dim]",
            help="latents of the goal, or a handle of Engine.encode",
        ),
        Parameter("goal_hidden_fill", float, help="all of a test goal's latents"),
        Parameter(
            "return_latents",
            bool,
            help="what candidates or a plan lead to; by default of candidates",
        ),
        Parameter(
            "energy", int, 0, low=0, high=129, help="points along two axes of a map of costs"
        ),
        Parameter(
            "energy_axes", str, "xy", choices=("xy", "xz", "yz"), help="the axes of that map"
        ),
        Parameter(
            "energy_span", float, 0.075, low=0, low_open=True, high=10, help="metres, to each side"
        ),
        Parameter("action_repeat", int, 1, low=1, help="how often an action of the map is done"),
        *_PLANNING,
    ],
    check=_together,
)


CARD = ModelCard(
    name="vjepa2_ac",
    title="V-JEPA 2-AC: what a robot will see after its actions, and plans to a goal",
    entry="mstar.models.vjepa2.model_ac:VJepa2Ac",
    inputs=("video", "image"),
    outputs=("latent", "action"),
    parameters=PARAMETERS,
    repos={"vjepa2_ac": "https://dl.fbaipublicfiles.com/vjepa2/vjepa2-ac-vitg.pt"},
    tiny=Path(__file__).parent / "tiny",
    full=Path(__file__).parent / "full",
    methods=("encode", "predict", "rollout", "plan"),
)
