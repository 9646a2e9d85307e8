"""The sizes and habits of a pi0.5 policy, from lerobot's config.json or the layout of openpi.

Whatever a file leaves out has the value of `lerobot/pi05_base`; keys that only training reads are
ignored. `custom_dims` (test checkpoints only) overrides what the variants stand for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from mstar.models.fields import (
    check_fields,
    check_flags,
    check_numbers,
    check_sizes,
    known,
    object_of,
    read_object,
)
from mstar.models.pi05.sizes import VARIANTS, GemmaSizes, VisionSizes

__all__ = [
    "ACTION",
    "IMAGES",
    "MODES",
    "OPENPI_CAMERAS",
    "SCHEDULES",
    "STATE",
    "Pi05Config",
    "mode_of",
    "names_of",
]

_T = TypeVar("_T")
_Count = int  # which may be 0

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
MODES = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")
SCHEDULES = ("LINEAR", "EXP", "ONES", "ZEROS")  # of the guidance, in real-time chunking
_MOST_CAMERAS = 64
_NORMALISATION = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}


@dataclass(frozen=True)
class Pi05Config:
    """A policy.

    Args:
        layout: `"lerobot"` or `"openpi"`: whose conventions it follows where they differ.
        cameras: names of the image inputs, in order.
        empty_cameras: how many of them, at the end, are never there.
        state_dim, action_dim: of the robot; None where the layout does not say.
        chunk_size: actions in a chunk, the horizon.
        normalization_mapping: kind of feature -> mode.
        state_in_prompt: whether the prompt spells the state out (openpi's `discrete_state_input`).
        rtc_config: of real-time chunking, as it is written; see `rtc`.
        rtc_training_max_delay: the longest hard prefix that it was trained with; 0 for none.

    Raises:
        ValueError: parts that do not fit each other, or a kind of policy that is not supported.
    """

    layout: str = "lerobot"
    vocab_size: int = 257152
    vision: VisionSizes = field(default_factory=VisionSizes)
    prefix: GemmaSizes = VARIANTS["gemma_2b"]
    expert: GemmaSizes = VARIANTS["gemma_300m"]
    cameras: tuple[str, ...] = OPENPI_CAMERAS
    empty_cameras: _Count = 0
    state_dim: int | None = None
    action_dim: int | None = None
    chunk_size: int = 50
    n_action_steps: int = 50
    max_state_dim: int = 32
    max_action_dim: int = 32
    num_inference_steps: int = 10
    min_period: float = 0.004
    max_period: float = 4.0
    tokenizer_max_length: int = 200
    normalization_mapping: Mapping[str, str] = field(default_factory=lambda: dict(_NORMALISATION))
    state_in_prompt: bool = True
    use_relative_actions: bool = False
    relative_exclude_joints: tuple[str, ...] = ("gripper",)
    action_feature_names: tuple[str, ...] | None = None
    rtc_config: Mapping[str, Any] | None = None
    rtc_training_max_delay: _Count = 0

    def __post_init__(self) -> None:
        check_fields(self)
        values, most = vars(self), self.rtc_training_max_delay
        fits = isinstance(most, int) and most >= 0
        _demand(fits, "rtc_training_max_delay", most, "must be an integer of at least 0")
        for name in [name for name in ("state_dim", "action_dim") if values[name] is not None]:
            check_sizes(values, (name,))
            most = values[f"max_{name}"]
            _demand(values[name] <= most, name, values[name], f"must be at most max_{name}={most}")
        if len(self.cameras) <= self.empty_cameras:
            raise ValueError("input_features: there must be an image")
        steps, most = self.n_action_steps, self.chunk_size
        _demand(steps <= most, "n_action_steps", steps, f"must be at most chunk_size={most}")
        check_flags(self.rtc, ("enabled",))
        check_sizes(self.rtc, ("execution_horizon",))
        check_numbers(self.rtc, ("max_guidance_weight",))
        name = "prefix_attention_schedule"
        _one_of(f"rtc_config.{name}", self.rtc[name], SCHEDULES)
        for kind, mode in self.normalization_mapping.items():
            _one_of(f"normalization_mapping.{kind}", mode, MODES)
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):  # they attend together
            one, other = getattr(self.prefix, name), getattr(self.expert, name)
            if one != other:
                raise ValueError(f"{name}: {one} in the prefix and {other} in the expert")

    @property
    def rtc(self) -> dict[str, Any]:
        """How chunks go on from each other where nothing else is asked for."""
        given = object_of(vars(self), "rtc_config")
        return {**_CHUNKING, **{name: value for name, value in given.items() if value is not None}}

    @property
    def norms(self) -> int:
        """Modulated norms of the expert: two in each layer, and the last one."""
        return 2 * self.expert.depth + 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Pi05Config:
        """Read a config.json of lerobot, or the one that openpi's converter writes.

        Raises:
            ValueError: it describes another kind of policy, or none.
        """
        config = {name: value for name, value in config.items() if value is not None}
        if "type" not in config and "action_horizon" in config:
            return cls._openpi(config)
        kind, steps = config.get("type"), config.get("n_obs_steps", 1)
        _demand(kind == "pi05", "type", kind, "must be 'pi05'")
        _demand(steps == 1, "n_obs_steps", steps, "must be 1")
        for name in ("use_visual_memory", "use_proprioceptive_memory"):
            if config.get(name):
                raise ValueError(f"{name}=true: policies with a memory (MEM) are not supported")
        given = {name: x for name, x in known(cls, config).items() if name not in _OURS}
        for name in ("relative_exclude_joints", "action_feature_names"):
            if name in given:
                given[name] = names_of(name, config[name])
        modes = object_of(config, "normalization_mapping").items()
        given["normalization_mapping"] = _NORMALISATION | {k: mode_of(mode) for k, mode in modes}
        features = object_of(config, "input_features")
        cameras = cls.cameras
        if features:
            seen = [name for name, each in features.items() if each.get("type") == "VISUAL"]
            cameras = tuple(name.removeprefix(IMAGES) for name in seen)
        given["cameras"] = _with_empty(cameras, config.get("empty_cameras", 0))
        given["state_dim"] = _width(features, STATE)
        given["action_dim"] = _width(object_of(config, "output_features"), ACTION)
        return cls(**given, **_networks(config))

    @classmethod
    def _openpi(cls, config: Mapping[str, Any]) -> Pi05Config:
        names = {"action_horizon": "chunk_size", "action_dim": "max_action_dim"}
        renamed = {new: config[old] for old, new in names.items() if old in config}
        renamed["n_action_steps"] = renamed["chunk_size"]
        if "discrete_state_input" in config:
            renamed["state_in_prompt"] = config["discrete_state_input"]
        return cls(layout="openpi", **renamed, **_networks(config))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Pi05Config:
        """Read a checkpoint's config.json. Older exports of openpi have none, but `assets`.

        Raises:
            FileNotFoundError: there is neither.
            ValueError: it describes another kind of policy, or none.
        """
        folder = Path(folder)
        file, assets = folder / "config.json", folder / "assets"
        if file.exists() or not assets.is_dir():
            config = read_object(file)
            if "type" in config or "action_horizon" not in config:
                return cls.from_dict(config)
        else:
            config = {}
        robots = [path.parent.name for path in sorted(assets.glob("**/norm_stats.json"))]
        known = _EXPORTS.get(robots[0], {}) if len(robots) == 1 else {}
        return cls.from_dict({"action_horizon": cls.chunk_size, **known, **config})

    def with_horizon(self, horizon: int) -> Pi05Config:
        """The same policy with chunks of another length, which no weight depends on."""
        return replace(self, chunk_size=horizon, n_action_steps=min(horizon, self.n_action_steps))


# openpi's named train configs, by the folder of their statistics, for what exports leave out.
_EXPORTS: dict[str, dict[str, Any]] = {
    "droid": {"action_horizon": 15},
    "libero": {"action_horizon": 10, "discrete_state_input": False},
    "trossen": {"action_horizon": 50},
}
_CHUNKING = {
    "enabled": False,
    "execution_horizon": 10,
    "prefix_attention_schedule": "LINEAR",
    "max_guidance_weight": 10.0,
}
# Fields that are not read as they are written.
_OURS = ("layout", "vision", "prefix", "expert", "cameras", "state_dim", "action_dim", "vocab_size")


def _networks(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the networks: those of the variants, unless `custom_dims` has others."""
    custom = object_of(config, "custom_dims")
    found: dict[str, Any] = {}
    for part, name, default in (
        ("prefix", "paligemma_variant", "gemma_2b"),
        ("expert", "action_expert_variant", "gemma_300m"),
    ):
        variant = config.get(name, default)
        _one_of(name, variant, VARIANTS)
        found[part] = _sized(VARIANTS[variant], custom, part)
    vision = _sized(VisionSizes(), custom, "vision")
    sides, patch = config.get("image_resolution", (224, 224)), vision.patch_size
    fits = isinstance(sides, Sequence) and len(sides) == 2
    fits = fits and all(isinstance(n, int) and n >= patch and n % patch == 0 for n in sides)
    what = f"must be a height and a width, multiples of {patch}"
    _demand(fits, "image_resolution", sides, what)
    found["vision"] = replace(vision, image_size=tuple(sides))
    if "vocab_size" in custom:
        found["vocab_size"] = custom["vocab_size"]
    return found


def _sized(default: _T, custom: Mapping[str, Any], part: str) -> _T:
    given = object_of(custom, part)
    if unknown := sorted(set(given) - set(vars(default))):
        raise ValueError(f"custom_dims.{part} has unknown {', '.join(unknown)}")
    try:
        return replace(default, **given)
    except ValueError as error:
        raise ValueError(f"custom_dims.{part}.{error}") from error


def _with_empty(cameras: tuple[str, ...], count: Any) -> tuple[str, ...]:
    """Cameras with those appended that are never there, unless they are listed already."""
    fits = isinstance(count, int) and 0 <= count <= _MOST_CAMERAS
    _demand(fits, "empty_cameras", count, f"must be an integer from 0 to {_MOST_CAMERAS}")
    empty = tuple(f"empty_camera_{index}" for index in range(count))
    return tuple(name for name in cameras if name not in empty) + empty


def _width(features: Mapping[str, Any], name: str) -> int | None:
    """How many numbers a feature has."""
    if name not in features:
        return None
    shape = features[name].get("shape")
    if not isinstance(shape, list) or len(shape) != 1:
        raise ValueError(f"{name}: its shape is {shape!r}, and must be one number")
    return shape[0]


def names_of(field: str, value: Any) -> tuple[str, ...]:
    """A list of names."""
    fits = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    _demand(fits, field, value, "must be a list of names")
    return tuple(value)


def mode_of(value: Any) -> Any:
    """A mode of normalisation as it is written here."""
    return value.upper() if isinstance(value, str) else value


def _one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    _demand(value in allowed, name, value, f"must be one of {', '.join(allowed)}")


def _demand(good: bool, name: str, value: Any, allowed: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r}: {allowed}")
