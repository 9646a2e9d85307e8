"""Everything between an observation and the networks, and between the networks and the robot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mstar.errors import InvalidRequest, WeightsError
from mstar.models.control.action_queue import lengthened
from mstar.models.parameters import demand
from mstar.models.pi05.config import ACTION, MODES, STATE, Pi05Config
from mstar.models.pi05.images import model_images
from mstar.models.pi05.normalise import Normalizer, relative_mask
from mstar.models.pi05.observation import numbers
from mstar.models.pi05.prompt import Tokenizer
from mstar.models.pi05.resize import RULES
from mstar.models.pi05.statistics import Processors, read_processors, read_statistics

__all__ = ["Prepared", "Processor"]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the networks take of an observation.

    Args:
        images: of the cameras that are there, in the policy's order, float32
            `[cameras, 3, height, width]`, -1 to 1.
        ids: the prompt, int64 `[text]`, without padding.
        state: in robot units, `[dims]`.
        normalised: in the model's space.
        cameras: the names of `images`.
    """

    images: Tensor
    ids: Tensor
    state: np.ndarray
    normalised: np.ndarray
    cameras: tuple[str, ...]


class Processor:
    """Of one checkpoint. Any thread may use it.

    Args:
        processors: what lies beside the weights.
        statistics: of the training data, instead of those: see `read_statistics`.
        resize: of `resize.RULES`; by default that of the policy's layout.
        state_padded_prompt: spell the state out with zeros up to `max_state_dim`, as policies
            trained with lerobot 0.4 and before expect.

    Raises:
        WeightsError: the files do not fit the policy.
    """

    def __init__(
        self,
        config: Pi05Config,
        tokenizer: Tokenizer,
        processors: Processors | None = None,
        *,
        statistics: Any = None,
        resize: str | None = None,
        state_padded_prompt: bool = False,
    ) -> None:
        demand(resize in (None, *RULES), "resize", resize, f"must be one of {', '.join(RULES)}")
        padded = state_padded_prompt
        demand(isinstance(padded, bool), "state_padded_prompt", padded, "must be true or false")
        if (size := tokenizer.size) > config.vocab_size:
            raise WeightsError(f"the tokenizer has {size} ids, and the policy {config.vocab_size}")
        processors = processors or Processors()
        self.config, self.tokenizer = config, tokenizer
        self.openpi = config.layout == "openpi"
        self.resize = resize or config.layout
        self.state_padded_prompt = state_padded_prompt
        self.rename = processors.rename
        self.dtype = np.float64 if self.openpi else np.float32
        found = processors.statistics if statistics is None else read_statistics(statistics)
        self.source = found.source
        modes = {**config.normalization_mapping, **processors.modes}
        if wrong := [mode for mode in modes.values() if mode not in MODES]:
            raise WeightsError(f"norm_map: {wrong[0]!r} must be one of {', '.join(MODES)}")
        self.of_state, self.of_actions = (
            Normalizer(name, modes.get(kind, "IDENTITY"), table, self.openpi, processors.eps)
            for name, kind, table in (
                (STATE, "STATE", found.state),
                (ACTION, "ACTION", found.action),
            )
        )
        self.action_dim = self._action_dim()
        dims, want = self.of_state.dims, config.state_dim
        if want is not None and dims not in (None, want):
            raise WeightsError(f"statistics of {dims} state dims, for a policy of {want}")
        relative, exclude = processors.relative, processors.exclude
        self.relative: np.ndarray | None = None
        if config.use_relative_actions if relative is None else relative:
            exclude = config.relative_exclude_joints if exclude is None else exclude
            names = processors.names or config.action_feature_names
            self.relative = relative_mask(self.action_dim, exclude, names)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        config: Pi05Config,
        *,
        statistics: Any = None,
        tokenizer: str | Path | None = None,
        **options: Any,
    ) -> Processor:
        """That of a checkpoint.

        Args:
            tokenizer: folder with a tokenizer.json, instead of the one that comes with it.

        Raises:
            WeightsError: a file is missing or wrong.
        """
        folder = Path(folder)
        processors = read_processors(folder)
        if statistics is None and config.layout == "openpi" and (folder / "assets").is_dir():
            statistics = folder / "assets"
        found = _tokenizer_folder(folder, processors.tokenizer, tokenizer)
        length = processors.max_length or config.tokenizer_max_length
        return cls(config, Tokenizer(found, length), processors, statistics=statistics, **options)

    @property
    def assumed(self) -> str:
        """What was taken for granted, in one line."""
        config = self.config
        state = f"{config.state_dim or self.of_state.dims or 'any number of'} state dims, "
        state += "in the prompt" if config.state_in_prompt else "not in the prompt"
        return (
            f"{config.layout} policy; statistics: {self.source} (state {self.of_state}; actions "
            f"{self.of_actions}); resize rule: {self.resize}; cameras: "
            f"{', '.join(config.cameras)}; {state}; chunks of {config.chunk_size} x "
            f"{self.action_dim} actions"
            + ("" if self.relative is None else ", relative to the state")
        )

    def check_robot_units(self) -> None:
        """Refuse to speak of robot units where there are no statistics to tell: of actions and,
        where the policy reads it, of the state.

        Raises:
            InvalidRequest: there are none.
        """
        lacking = [f"actions ({self.of_actions.mode})"] if not self.of_actions.known else []
        if self.config.state_in_prompt and not self.of_state.known:
            lacking.append(f"the state ({self.of_state.mode}), which the prompt spells out")
        if lacking:
            raise InvalidRequest(
                "raw",
                False,
                f"the checkpoint has no statistics of {' and of '.join(lacking)}, so actions "
                'cannot be given in robot units: Engine(..., options={"statistics": ...}) takes '
                "them (mstar serve: --option statistics=FILE), or raw=True for the model's "
                "normalised space, with a state that is normalised already",
            )

    def prepare(self, images: Mapping[str, Any], state: Any, task: str | None) -> Prepared:
        """Lay an observation out for the networks.

        Args:
            images: camera -> image (see `images.model_images`); those left out are masked.
            state: in robot units, `[dims]`.
            task: in words.

        Raises:
            InvalidRequest: something is missing, or has another shape.
        """
        demand(task is not None, "text", None, "the task is missing")
        cameras = self._cameras(images)
        state = self._state(state)
        normalised = self.of_state.forward(state)
        named = {f"images.{name}": images[name] for name in cameras}
        stacked = model_images(named, self.config.vision.image_size, self.resize)
        if stacked.is_cuda:  # the engine's thread does not know the caller's stream
            torch.cuda.current_stream(stacked.device).synchronize()
        ids = torch.tensor(self._ids(task, normalised))
        return Prepared(stacked, ids, state, normalised, cameras)

    def finish(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Actions in robot units, `[horizon, action_dim]`.

        Args:
            actions: of the networks, float32 `[horizon, columns]`, padding and all.
            state: `Prepared.state`.
        """
        found = self.of_actions.inverse(actions[:, : self.action_dim])
        return found if self.relative is None else found + self.base(state)

    def finish_on(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """`finish` for tensors on a device, of actions and `base`: the same bits."""
        inverse = self.of_actions.inverse_on(device)
        if self.relative is None:
            return lambda actions, base: inverse(actions)
        return lambda actions, base: inverse(actions) + base.unsqueeze(-2)

    def previous(self, processed: np.ndarray, state: np.ndarray, rows: int) -> np.ndarray:
        """What is left of a chunk in robot units, in the model's space as of another state.

        Args:
            processed: `[left, action_dim]`, as `finish` gave it.
            state: the robot's now.
            rows: how many are needed; the last one is repeated where there are fewer.

        Returns:
            Float32 `[rows, action_dim]`.
        """
        found = lengthened(processed, rows)
        if self.relative is not None:
            found = found - self.base(state)
        return self.of_actions.forward(found.astype(self.dtype)).astype(np.float32)

    def base(self, state: np.ndarray) -> np.ndarray:
        """What actions are added to where they are relative, `[action_dim]`; zeros elsewhere."""
        base = np.zeros(self.action_dim, state.dtype)
        if self.relative is not None:
            count = min(len(state), self.action_dim)
            base[:count] = state[:count]
            base[~self.relative] = 0
        return base

    def _cameras(self, images: Mapping[str, Any]) -> tuple[str, ...]:
        known = self.config.cameras
        unknown = ", ".join(str(name) for name in images if name not in known)
        found = tuple(name for name in known if images.get(name) is not None)
        what = f"there is no camera {unknown}" if unknown else "there is none"
        what += f"; at least one of {', '.join(known)} is needed"
        demand(bool(found) and not unknown, "images", list(images), what)
        return found

    def _state(self, state: Any) -> np.ndarray:
        demand(state is not None, "robot_state", None, "is missing")
        found = numbers("robot_state", state, self.dtype)
        want = self.config.state_dim if self.of_state.dims is None else self.of_state.dims
        most = self.config.max_state_dim if want is None else want
        least = 1 if want is None or self.openpi else want
        what = f"must be {f'1 to {most}' if want is None else want} numbers"
        demand(least <= len(found) <= most, "robot_state", f"{len(found)} numbers", what)
        return found

    def _ids(self, task: str, normalised: np.ndarray) -> list[int]:
        if not self.config.state_in_prompt:
            return self.tokenizer.without_state(task)
        missing = max(0, self.config.max_state_dim - len(normalised))
        if self.state_padded_prompt:
            normalised = np.pad(normalised, (0, missing))
        return self.tokenizer.with_state(task, normalised)

    def _action_dim(self) -> int:
        dims, found = self.config.action_dim, self.of_actions.dims
        most = self.config.max_action_dim
        if found is not None and (found > most or dims not in (None, found)):
            raise WeightsError(f"statistics of {found} action dims, for a policy of {dims or most}")
        return dims or found or most


def _tokenizer_folder(folder: Path, named: str | None, given: str | Path | None) -> Path:
    """Where the tokenizer.json is."""
    if given is not None:
        return Path(given)
    inside = [folder / named] if named and not Path(named).is_absolute() else []
    for place in (*inside, folder / "tokenizer", folder):
        if (place / "tokenizer.json").is_file():
            return place
    raise WeightsError(
        f"{folder} has no tokenizer ({named or 'google/paligemma-3b-pt-224'} is meant): "
        'Engine(..., options={"tokenizer": ...}) takes the folder that holds its tokenizer.json'
    )
