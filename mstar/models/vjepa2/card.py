"""The card of V-JEPA 2: a clip to latents, to predictions of others, to labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mstar.errors import InvalidRequest
from mstar.models.arrays import as_array
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters, demand

__all__ = ["CARD", "NUM_FRAMES", "STREAM", "token_ids"]

_OWNER = "facebook/vjepa2-"
_OTHERS = (
    *("vith-fpc64-256", "vitg-fpc64-256", "vitg-fpc64-384"),
    *("vitl-fpc16-256-ssv2", "vitg-fpc64-384-ssv2"),
    *("vitl-fpc32-256-diving48", "vitg-fpc32-384-diving48"),
)


def token_ids(value: Any) -> np.ndarray:
    """Numbers of tokens, int64 `[tokens]`, of lists or arrays `[tokens]` or `[1, tokens]`."""
    try:
        ids = as_array(value)
    except (TypeError, ValueError):
        ids = np.asarray(None)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError("must be one list of numbers of tokens, integers")
    if ids.min() < 0:
        raise ValueError(f"{ids.min()} is among them; tokens are numbered from 0")
    return ids.astype(np.int64)


def _together(values: dict[str, Any]) -> None:
    masks = [name for name in ("context_mask", "target_mask") if values[name] is not None]
    if len(masks) == 1:
        raise InvalidRequest(masks[0], values[masks[0]], "context_mask and target_mask go together")
    lost = values["context_only"] and not masks
    demand(not lost, "context_only", True, "goes with context_mask and target_mask")
    both = values["num_frames"] is not None and values["fps"] is not None
    demand(not both, "fps", values["fps"], "give either num_frames or fps")
    flows = {
        "skip_predictor": values["skip_predictor"],
        "rollout_horizon": values["rollout_horizon"] > 1,
        "context_mask": bool(masks),
    }
    asked = [name for name, given in flows.items() if given]
    for name in asked[1:]:
        raise InvalidRequest(name, values[name], f"does not go with {asked[0]}")


NUM_FRAMES = Parameter(
    "num_frames",
    int,
    low=1,
    high=1024,
    help="taken evenly; by default all, of files at most as in training",
)
STREAM = Parameter("stream_rollout", bool, False, help="give each step as soon as it is there")
_IDS = {"accepts": "a list of numbers of tokens: (time * rows + row) * columns + column"}
PARAMETERS = Parameters(
    "vjepa2",
    [
        NUM_FRAMES,
        Parameter("fps", float, low=0, low_open=True, high=1000, help="of those taken"),
        Parameter("skip_predictor", bool, False, help="the encoder's tokens alone"),
        Parameter("context_mask", token_ids, help="tokens that the predictor sees", **_IDS),
        Parameter(
            "target_mask",
            token_ids,
            help="tokens that it predicts; those behind the clip's last are its future",
            **_IDS,
        ),
        Parameter("context_only", bool, False, help="encode context_mask alone, as training"),
        Parameter(
            "rollout_horizon", int, 0, low=0, help="how many times what comes next is predicted"
        ),
        STREAM,
        Parameter(
            "num_output_frames", int, 2, low=1, high=1024, help="frames that a step predicts"
        ),
        Parameter(
            "steps_ahead",
            int,
            2,
            low=0,
            high=1024,
            help="tubelets from the clip to what is predicted: seconds * fps / tubelet size",
        ),
        Parameter("classify", bool, False, help="labels and scores, of models with a classifier"),
        Parameter("top_k", int, 5, low=1, help="labels that are told, likeliest first"),
    ],
    check=_together,
)


CARD = ModelCard(
    name="vjepa2",
    title="V-JEPA 2: videos and images to latents, predictions, labels",
    entry="mstar.models.vjepa2.model:VJepa2",
    inputs=("image", "video"),
    outputs=("latent", "text"),
    parameters=PARAMETERS,
    repos={"vjepa2": f"{_OWNER}vitl-fpc64-256"},
    aliases=tuple(map(_OWNER.__add__, _OTHERS)),
    tiny=Path(__file__).parent / "tiny",
    full=Path(__file__).parent / "full",
    methods=("encode", "predict"),
)
