"""What robots call their cameras, joints and actions, and the conventions of openpi's examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from mstar.errors import InvalidRequest
from mstar.models.parameters import demand, plain, positive
from mstar.models.pi05 import aloha
from mstar.models.pi05.config import IMAGES, OPENPI_CAMERAS, STATE, Pi05Config
from mstar.models.pi05.images import image_faults
from mstar.models.pi05.observation import flat, numbers, slashed

__all__ = ["PRESETS", "Observed", "Robot", "robot_for", "robot_of"]

_BASE, _LEFT, _RIGHT = OPENPI_CAMERAS


@dataclass(frozen=True)
class Observed:
    """An observation in the policy's words.

    Args:
        images: camera -> image, as it was given.
        state: in robot units, as the policy knows them, `[dims]`.
        prompt: the task.
    """

    images: Mapping[str, Any]
    state: np.ndarray | None
    prompt: str | None


_LISTS = (
    ("required", str, "names"),
    ("unused", str, "names"),
    ("delta", (bool, int), "true and false"),
    ("reset_pose", (int, float), "numbers"),
)
_SINGLE = (
    ("name", str, "a name"),
    ("prompt", str, "a name"),
    ("default_prompt", str | None, "a text, or None"),
    ("encode_state", Callable | None, "a function, or None"),
    ("decode_actions", Callable | None, "a function, or None"),
)


@dataclass(frozen=True)
class Robot:
    """A robot: which keys of an observation mean what, and how actions are handed out.

    Args:
        images: camera of the policy -> key.
        state: keys whose values, one after the other, are the state -> how many numbers each has.
        prompt: key of the task.
        required: cameras that must be there; of the others, those that are missing are masked.
        unused: keys that are known and not needed.
        action_dim: columns of actions; None for those of the policy.
        delta: which of the actions are relative to the state; none if empty.
        fps: control steps per second.
        run: rows of a chunk that the published client executes.
        default_prompt: the task where an observation has none.
        reset_pose: joints where its published client begins an episode, if it asks for them.
        rename: key of an observation -> the key that is meant.
        encode_state, decode_actions: to the policy's joints and back.

    Raises:
        InvalidRequest: a field has another form.
    """

    name: str
    images: Mapping[str, str]
    state: Mapping[str, int | None]
    prompt: str = "prompt"
    required: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    action_dim: int | None = None
    delta: tuple[bool, ...] = ()
    fps: float | None = None
    run: int | None = None
    default_prompt: str | None = None
    reset_pose: tuple[float, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    encode_state: Callable[[np.ndarray], np.ndarray] | None = None
    decode_actions: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        for name in ("images", "state", "rename"):
            given, kinds = getattr(self, name), (int, type(None)) if name == "state" else str
            pairs = given.items() if isinstance(given, Mapping) else [(None, None)]
            fits = all(isinstance(k, str) and isinstance(v, kinds) for k, v in pairs)
            what = "numbers, or None for any number" if name == "state" else "names"
            demand(fits, f"robot.{name}", given, f"must be a map from names to {what}")
        demand(bool(self.images), "robot.images", self.images, "must have a camera")
        for name, kinds, what in _LISTS:
            given = getattr(self, name)
            fits = isinstance(given, Iterable) and not isinstance(given, str | bytes)
            fits = fits and getattr(given, "ndim", 1) == 1
            values = tuple(map(plain, given)) if fits else ()
            fits = fits and all(isinstance(each, kinds) for each in values)
            demand(fits, f"robot.{name}", given, f"must be a list of {what}")
            object.__setattr__(self, name, values)
        for name, kind, what in _SINGLE:
            given = getattr(self, name)
            demand(isinstance(given, kind), f"robot.{name}", given, f"must be {what}")
        for name in ("action_dim", "run"):
            given = getattr(self, name)
            fits = given is None or (isinstance(given, int) and given >= 1)
            demand(fits, f"robot.{name}", given, "must be at least 1, or None")
        if self.fps is not None:
            positive("robot.fps", self.fps, 1e4)
        allowed = f"must be of images, which has {', '.join(self.images)}"
        for camera in self.required:
            demand(camera in self.images, "robot.required", camera, allowed)

    def observe(self, observation: Mapping[str, Any]) -> Observed:
        """Pick out what the policy needs. Keys that nobody knows are ignored, but for images.

        Raises:
            InvalidRequest: things are missing or have another shape; all of them are named.
        """
        given = flat(observation, self.rename)
        faults: list[str] = []
        images = {}
        for camera, key in self.images.items():
            if (place := slashed(key)) in given:
                images[camera] = given.pop(place)
                faults += image_faults(key, images[camera])
            elif camera in self.required:
                faults.append(f"{key} is missing")
        if not images and not faults:
            keys = ", ".join(self.images.values())
            faults.append(f"there is no image: at least one of {keys} is needed")
        parts = []
        for key, count in self.state.items():
            if (place := slashed(key)) not in given:
                faults.append(f"{key} is missing")
                continue
            try:
                part = numbers(key, given.pop(place))
            except InvalidRequest as error:
                faults.append(str(error))
                continue
            if count is not None and len(part) != count:
                faults.append(f"{key} has {len(part)} numbers, and must have {count}")
            parts.append(part)
        prompt = given.pop(slashed(self.prompt), self.default_prompt)
        if isinstance(prompt, np.ndarray):
            prompt = prompt.reshape(-1).tolist()
        if isinstance(prompt, (list, tuple)) and len(prompt) == 1:
            prompt = prompt[0]
        if isinstance(prompt, bytes):
            prompt = prompt.decode("utf-8", "replace")
        if prompt is None:
            faults.append(f"{self.prompt}, the task, is missing")
        elif not isinstance(prompt, str):
            faults.append(f"{self.prompt} is a {type(prompt).__name__}, and must be text")
        places = {slashed(key).rpartition("/")[0] for key in self.images.values()}
        strange = sorted(set(given).difference(map(slashed, self.unused)))
        cameras = [key for key in strange if key.rpartition("/")[0] in places - {"", "observation"}]
        faults += [f"{key} is no camera of this robot" for key in cameras]
        if faults:
            rest = ", ".join(key for key in strange if key not in cameras)
            text = "; ".join(faults) + (f" (keys that nobody knows: {rest})" if rest else "")
            raise InvalidRequest("observation", sorted(flat(observation)), text)
        state = np.concatenate(parts) if parts else None
        if state is not None and self.encode_state is not None:
            state = self.encode_state(state)
        count, least = 0 if state is None else len(state), len(self.delta)
        allowed = f"{least} actions are relative to it"
        demand(count >= least, "robot_state", f"{count} numbers", allowed)
        return Observed(images, state, None if prompt is None else str(prompt))

    def act(self, actions: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """Actions `[horizon, action_dim]` for the robot, of such in the policy's joints.

        Args:
            actions: un-normalised, `[horizon, dims]`.
            state: `Observed.state`.
        """
        actions = actions[:, : self.action_dim]
        if self.delta:
            mask = np.array(self.delta)
            actions = actions.copy()
            actions[:, : len(mask)] += np.where(mask, state[: len(mask)], 0)
        return actions if self.decode_actions is None else self.decode_actions(actions)


PRESETS = {
    "droid": Robot(
        "droid",
        images={_BASE: "observation/exterior_image_1_left", _LEFT: "observation/wrist_image_left"},
        state={"observation/joint_position": 7, "observation/gripper_position": 1},
        required=(_BASE, _LEFT),
        action_dim=8,
        fps=15,
        run=8,
    ),
    "libero": Robot(
        "libero",
        images={_BASE: "observation/image", _LEFT: "observation/wrist_image"},
        state={"observation/state": 8},
        required=(_BASE, _LEFT),
        action_dim=7,
        run=5,
    ),
    "aloha": Robot(
        "aloha",
        images={
            _BASE: "images/cam_high",
            _LEFT: "images/cam_left_wrist",
            _RIGHT: "images/cam_right_wrist",
        },
        state={"state": 14},
        unused=("images/cam_low",),
        action_dim=14,
        delta=(*[True] * 6, False) * 2,
        fps=50,
        run=25,
        reset_pose=(0, -1.5, 1.5, 0, 0, 0),
        encode_state=aloha.encode_state,
        decode_actions=aloha.decode_actions,
    ),
}


def robot_of(config: Pi05Config, rename: Mapping[str, str] | None = None) -> Robot:
    """The robot that a policy of lerobot was trained on, in lerobot's words.

    Args:
        rename: see `Robot`.
    """
    present = config.cameras[: len(config.cameras) - config.empty_cameras]
    return Robot(
        "lerobot",  # some of whose policies have one camera, `observation.image`
        images={c: c if c.startswith("observation.") else IMAGES + c for c in present},
        state={STATE: config.state_dim},
        prompt="task",
        action_dim=config.action_dim,
        rename=rename or {},
    )


def robot_for(robot: Any, *, deltas: bool = True) -> Robot:
    """The robot that somebody means.

    Args:
        robot: a name of `PRESETS`; a `Robot`; or fields of one in a map, of which those that are
            missing are those of `preset`, if that is given. There, `adapt` is whether the preset's
            `encode_state` and `decode_actions` apply.
        deltas: whether the policy was trained as openpi trains for a preset, to make actions that
            are relative to the state where that has a `delta`. A `delta` that is given counts.

    Raises:
        InvalidRequest: there is no such robot, or a field is wrong.
    """
    if isinstance(robot, Robot):
        return robot
    given = dict(robot) if isinstance(robot, Mapping) else {"preset": robot}
    name, adapt = given.pop("preset", None), given.pop("adapt", True)
    known = [each.name for each in fields(Robot)]
    for key, value in given.items():
        allowed = f"unknown; there are preset, adapt, {', '.join(known)}"
        demand(key in known, f"robot.{key}", value, allowed)
    if name is None and given:
        return Robot(**{"name": "custom", "images": {}, "state": {}, **given})
    allowed = f"must be one of {', '.join(PRESETS)}, or a Robot, or a map of its fields"
    demand(isinstance(name, str) and name in PRESETS, "robot", name, allowed)
    found = PRESETS[name] if deltas else replace(PRESETS[name], delta=())
    if not adapt:
        found = replace(found, encode_state=None, decode_actions=None)
    if "images" in given:
        given.setdefault("required", [c for c in found.required if c in given["images"]])
    return replace(found, **given)
