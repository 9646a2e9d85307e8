"""The networks of a policy together: what is computed once for an observation, and the flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.weights import Source
from mstar.errors import WeightsError
from mstar.models.base import filled
from mstar.models.pi05.attention import KeysValues
from mstar.models.pi05.config import Pi05Config
from mstar.models.pi05.flow import Steered, Velocity, euler
from mstar.models.pi05.gemma import Expert, Prefix
from mstar.models.pi05.layout import EMBEDDING, GEMMA, PROJECTOR, TOWER, Published
from mstar.models.pi05.timestep import FlowHeads
from mstar.models.pi05.vision import VisionTower

__all__ = ["Policy", "load_policy", "policy_config"]

# Our modules -> where their parameters are in a checkpoint.
_PREFIXES = {
    "vision": TOWER,
    "projector": PROJECTOR,
    "prefix": GEMMA,
    "expert": "paligemma_with_expert.gemma_expert.model.",
}


class Trunk(nn.Module):
    """All that runs in the run dtype; the weights of its norms are float32."""

    def __init__(self, config: Pi05Config, whole: bool) -> None:
        super().__init__()
        width = config.prefix.width
        self.vision = VisionTower(config.vision)
        self.projector = nn.Linear(config.vision.hidden_size, width)
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.prefix = Prefix(config.prefix, whole=whole)
        self.expert = Expert(config.expert)

    def sources(self, name: str) -> Sequence[Source]:
        """Where parameter `name` is in a checkpoint."""
        module, path = name.split(".", 1)
        if module == "embed_tokens":
            return (Source((EMBEDDING,)),)
        own = getattr(getattr(self, module), "sources", None)
        found = (Source((path,)),) if own is None else own(path)
        prefix = _PREFIXES[module]
        return [replace(s, names=tuple(prefix + each for each in s.names)) for s in found]


class _Norms(nn.Module):
    """The norms of a trunk, under their names in it."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        named = trunk.named_modules()
        self._modules.update((name, x) for name, x in named if "norm" in name.rpartition(".")[2])
        self.sources = trunk.sources


class Policy(nn.Module):
    """Observation -> chunk of actions, in the model's normalised space.

    Nothing here asks a tensor for its value, and shapes follow from those of the arguments: on a
    GPU all of it can be one captured graph, see `whole.py`.

    Args:
        whole: keep what only the published, padded computation needs; see `plain.py`.
    """

    def __init__(self, config: Pi05Config, *, whole: bool = False) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config, whole)
        self.heads = FlowHeads(config)

    def encode_images(self, images: Tensor) -> Tensor:
        """Tokens `[images, patches, width]` of images `[images, 3, height, width]`, -1 to 1."""
        return self.trunk.projector(self.trunk.vision(images))

    def embed_text(self, ids: Tensor) -> Tensor:
        """Tokens `[..., width]` of ids `[...]`; text alone is scaled by the root of the width."""
        return F.embedding(ids, self.trunk.embed_tokens.weight) * self.config.prefix.width**0.5

    def read(self, images: Tensor, ids: Tensor, length: Tensor | None = None) -> KeysValues:
        """Read one observation.

        Args:
            images: of the cameras that are there, float32 `[cameras, 3, height, width]`, -1 to 1.
            ids: int64 `[text]`.
            length: how many ids are valid, int `[1]`, where the rest is padding; None for all.
        """
        seen = self.encode_images(images).flatten(0, 1)
        tokens = torch.cat([seen, self.embed_text(ids).to(seen.dtype)]).unsqueeze(0)
        return self.prefix(tokens, None if length is None else length + len(seen))

    def prefix(self, tokens: Tensor, lengths: Tensor | None = None) -> KeysValues:
        """Read the valid tokens of observations, images before text; see `Prefix.forward`."""
        return self.trunk.prefix(tokens, self.config.chunk_size, lengths)

    def table(self, steps: int) -> Tensor:
        """What every step and norm of the expert takes for its time; see `FlowHeads.table`."""
        return self.heads.table(steps)

    def velocity(self, kv: KeysValues, table: Tensor) -> Velocity:
        """Velocities after an observation, with the times of `table`."""
        expert, heads = self.trunk.expert, self.heads
        places = expert.places(kv)
        dtype = kv.layers.dtype

        def velocity(x: Tensor, step: int, clean: Tensor | None = None) -> Tensor:
            modulation = table[step, None, None]
            if clean is not None:
                modulation = torch.where(clean[..., None, None, None], table[-1], modulation)
            tokens = heads.tokens(x).to(dtype)
            return heads.velocity(expert(tokens, kv, places, modulation))

        return velocity

    def denoise(
        self, kv: KeysValues, noise: Tensor, table: Tensor, steered: Steered | None = None
    ) -> Tensor:
        """Actions float32 `[batch, horizon, actions]`, padding columns and all.

        Args:
            noise: float32 `[batch, horizon, actions]`.
            table: of `table(steps)`.
            steered: real-time chunking, if any.
        """
        return euler(self.velocity(kv, table), noise, len(table) - 1, steered)

    def sample(
        self,
        images: Tensor,
        ids: Tensor,
        noise: Tensor,
        table: Tensor,
        *,
        length: Tensor | None = None,
        steered: Steered | None = None,
    ) -> Tensor:
        """One observation to actions float32 `[horizon, actions]`; see `read` and `denoise`.

        Args:
            noise: float32 `[horizon, actions]`.
        """
        return self.denoise(self.read(images, ids, length), noise.unsqueeze(0), table, steered)[0]


def policy_config(folder: Path, horizon: int | None = None) -> Pi05Config:
    """What the files in `folder` describe.

    Args:
        horizon: actions in a chunk, where the files do not say or another number is wanted.

    Raises:
        WeightsError: the config is missing or wrong.
    """
    try:
        config = Pi05Config.from_folder(folder)
        return config if horizon is None else config.with_horizon(horizon)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no {error.filename}") from error
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise WeightsError(f"cannot use the config in {folder}: {error}") from error


def load_policy(
    folder: Path, *, config: Pi05Config | None = None, whole: bool = False, **how: Any
) -> Policy:
    """A policy as `filled` has it, but for the norms and `FlowHeads`, which are float32.

    Args:
        config: `policy_config(folder)` if left out.
        whole: see `Policy`.
    """
    with torch.device("meta"):
        policy = Policy(config or policy_config(folder), whole=whole)
    checkpoint = cache(lambda: Published(folder))
    filled(policy.trunk, checkpoint, **how)
    exact = {**how, "dtype": torch.float32}
    filled(policy.heads, checkpoint, **exact)
    if how["dtype"] != torch.float32:
        filled(_Norms(policy.trunk), checkpoint, **exact)
    return policy.eval()
