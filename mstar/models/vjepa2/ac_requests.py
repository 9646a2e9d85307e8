"""A request to V-JEPA 2-AC, laid out in its caller's thread: a flow, and all that it needs.

Whatever is missing, wrong or too much raises InvalidRequest.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mstar.models.base import Inputs
from mstar.models.parameters import demand
from mstar.models.vjepa2.ac_config import AcConfig
from mstar.models.vjepa2.ac_inputs import (
    Course,
    check_frames,
    course,
    extrinsics_of,
    goal_of,
    paired,
    rows,
)
from mstar.models.vjepa2.cem import SEARCHED, Cem
from mstar.models.vjepa2.preprocess import squares
from mstar.models.vjepa2.requests import frames_of, still_or_clip

__all__ = ["Asked", "Search", "landscape", "lay_out", "search_of", "searching"]

_GOALS = ("goal_hidden", "goal_image", "goal_hidden_fill")


@dataclass(frozen=True, eq=False)
class Search:
    """How to plan: `noise` is float32 `[iterations, horizon, samples, 4]`, or None for that of the
    seed; `budget` in seconds; `cost` as in `cost`."""

    cem: Cem = field(default_factory=Cem)
    noise: Tensor | None = None
    seed: int = 0
    budget: float | None = None
    cost: str = "l1"


@dataclass(frozen=True, eq=False)
class Asked:
    """What a request comes to.

    Args:
        flow: `"encode"`, `"pass"`, `"rollout"`, `"score"` (after rollouts), `"plan"` or `"energy"`.
        seen: frames uint8 `[frames, 3, side, side]`, or latents `[frames, patches, embed_dim]`.
        clip: whether they are encoded as one clip.
        moves: actions and states of a single pass, float32 `[samples, frames, 7]`.
        course: actions and states from the last frame on, of the other flows.
        extrinsics: float32 `[frames and steps, 6]`.
        goal: see `goal_of`.
    """

    flow: str
    seen: Tensor
    clip: bool = False
    moves: tuple[Tensor, Tensor] | None = None
    course: Course | None = None
    extrinsics: Tensor | None = None
    goal: Tensor | None = None
    search: Search | None = None


def lay_out(
    inputs: Inputs, params: Mapping[str, Any], outputs: Sequence[str], config: AcConfig
) -> Asked:
    """The flow that is meant, with what it needs."""
    flow = _flow(params)
    chooses = flow in ("plan", "score") or (flow == "pass" and params["mpc"])
    acts, told = "action" in outputs, ("output_modalities", outputs)
    demand(chooses or not acts, *told, "only plan and mpc make actions")
    demand(acts or flow != "plan", *told, "a plan is of actions: ask for action")
    aims = bool(params["mpc"] or params["plan"] or params["energy"])
    for name in _GOALS:
        good = aims or params[name] is None
        demand(good, name, "given", "a goal goes with mpc, plan or energy")
    inputs, pictured = _goal_apart(inputs, params) if aims else (inputs, ())
    field, value = still_or_clip(inputs)
    first = None if flow in ("encode", "pass") else params["context_frames"]
    count, usual = params["num_frames"], config.num_frames
    frames = frames_of(field, value, squares, num_frames=count, usual=usual, first=first)
    if flow == "encode":
        return Asked(flow, frames, params["clip"] != "frames")
    if flow in ("plan", "energy"):
        states, goal = rows("states", params["states"]), _goal(pictured, params, config)
        return searching(frames, states, goal, params, config)
    goal = _goal(pictured, params, config) if params["mpc"] else None
    if flow == "pass":
        return _single(frames, goal, params, config)
    horizon, total = params["rollout_horizon"], len(frames) - 1 + params["rollout_horizon"]
    check_frames("rollout_horizon", horizon, total, config)
    moves = rows("actions", params["actions"]), rows("states", params["states"])
    path = course(*moves, len(frames), horizon)
    extrinsics = extrinsics_of(params["extrinsics"], config, total)
    return Asked(flow, frames, course=path, extrinsics=extrinsics, goal=_last(goal))


def searching(
    seen: Tensor, states: Tensor, goal: Tensor, params: Mapping[str, Any], config: AcConfig
) -> Asked:
    """A plan, or a map of costs if there is `energy`; actions are only those between the frames
    that were seen."""
    past, search = len(seen) - 1, None
    if params.get("energy"):
        demand(params["energy"] >= 2, "energy", params["energy"], "must be at least 2 points")
        horizon = params["action_repeat"]
        check_frames("action_repeat", horizon, past + horizon, config)
        future = landscape(params["energy"], params["energy_axes"], params["energy_span"], horizon)
    else:
        search = search_of(params)
        horizon = search.cem.horizon
        check_frames("horizon", horizon, past + horizon, config)
        future = torch.zeros(1, horizon, 7)
    known = rows("actions", params["actions"])[:1, :past] if past else future[:1, :0]
    allowed = f"must be {past}, those between the {past + 1} frames that were seen"
    demand(known.shape[1] >= past, "actions", f"{known.shape[1]} rows", allowed)
    known = known.expand(len(future), -1, -1)
    path = course(torch.cat([known, future], 1), states[:1, : past + 1], past + 1, horizon)
    extrinsics = extrinsics_of(params["extrinsics"], config, past + horizon)
    flow = "energy" if search is None else "plan"
    return Asked(flow, seen, course=path, extrinsics=extrinsics, goal=_last(goal), search=search)


def search_of(params: Mapping[str, Any]) -> Search:
    """The planner's settings, of parameters; see `card_ac.PLANNING`."""
    names = Cem.__dataclass_fields__
    cem = Cem(**{name: params[name] for name in names if params[name] is not None})
    shape = cem.iterations, cem.horizon, cem.samples, SEARCHED
    noise, seed, budget = params["noise"], params["seed"], params["budget_ms"]
    if noise is not None:
        demand(noise.shape == shape, "noise", f"array {noise.shape}", f"must be {list(shape)}")
        noise = torch.tensor(noise, dtype=torch.float32)
    seed = secrets.randbits(63) if seed is None else seed
    return Search(cem, noise, seed, None if budget is None else budget / 1e3, params["cost"])


def landscape(points: int, axes: str, span: float, repeat: int) -> Tensor:
    """Constant actions float32 `[points * points, repeat, 7]`, the first axis slowest."""
    places = torch.linspace(-span, span, points)
    actions = torch.zeros(points, points, repeat, 7)
    actions[..., "xyz".index(axes[0])] = places.view(-1, 1, 1)
    actions[..., "xyz".index(axes[1])] = places.view(1, -1, 1)
    return actions.flatten(0, 1)


def _flow(params: Mapping[str, Any]) -> str:
    for name, flow in (("skip_predictor", "encode"), ("plan", "plan"), ("energy", "energy")):
        if params[name]:
            return flow
    if params["mpc"]:
        return "score" if params["rollout_horizon"] else "pass"
    return "rollout" if params["rollout_horizon"] > 1 else "pass"


def _single(
    frames: Tensor, goal: Tensor | None, params: Mapping[str, Any], config: AcConfig
) -> Asked:
    """A single pass: one action and one state for each frame, or for each tubelet of a clip."""
    count = rows("actions", params["actions"]).shape[1]
    natural = max(1, len(frames) // config.tubelet_size)
    lengths = {"frames": len(frames), "natural": natural}
    fitting = [kind for kind, length in lengths.items() if length == count]
    kind = params["clip"] or next(iter(fitting), None)
    allowed = f"must be {len(frames)}, one a frame, or {natural}, one a tubelet of the clip"
    if kind is not None:
        allowed = f"must be {lengths[kind]} with clip={kind}"
    demand(kind in fitting, "actions", f"{count} rows", allowed)
    moves = paired(params["actions"], params["states"], count)
    check_frames("actions", f"{count} rows", count, config)
    if goal is not None and goal.dtype != torch.uint8:
        allowed = f"must be of 1 or of all {count} frames"
        demand(len(goal) in (1, count), "goal_hidden", f"{len(goal)} frames", allowed)
    extrinsics = extrinsics_of(params["extrinsics"], config, count)
    return Asked("pass", frames, kind == "natural", moves, extrinsics=extrinsics, goal=goal)


def _goal_apart(inputs: Inputs, params: Mapping[str, Any]) -> tuple[Inputs, Sequence[Any]]:
    """What is seen, and the images that show the goal: those beside a video or, where it is not
    given otherwise, the last of several images."""
    images = list(inputs.images)
    if inputs.video:
        return Inputs(video=inputs.video), images
    if len(images) > 1 and all(params[name] is None for name in _GOALS):
        return Inputs(images=images[:-1]), images[-1:]
    return inputs, ()


def _goal(pictured: Sequence[Any], params: Mapping[str, Any], config: AcConfig) -> Tensor:
    given = {**{name: params[name] for name in _GOALS}, "images": pictured or None}
    names = [name for name, value in given.items() if value is not None]
    demand(bool(names), "goal_image", None, "a goal is needed: an image, or goal_hidden")
    name, *more = names
    demand(not more, "".join(more[:1]), "given", f"the goal is given as {name} already")
    if name == "goal_hidden_fill":
        return torch.full((1, config.patches, config.embed_dim), given[name])
    if name == "images":
        count = len(given[name])
        demand(count == 1, name, f"{count} images", "the goal is one image")
        return goal_of("goal_image", given[name][0], config)
    return goal_of(name, given[name], config)


def _last(goal: Tensor | None) -> Tensor | None:
    return None if goal is None else goal[-1:]
