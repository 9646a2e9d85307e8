"""The networks of a checkpoint together, and how they are loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mstar.errors import WeightsError
from mstar.models.base import filled
from mstar.models.vjepa2.ac_config import AcConfig
from mstar.models.vjepa2.ac_predictor import AcPredictor
from mstar.models.vjepa2.classifier import Classifier
from mstar.models.vjepa2.config import PUBLISHED, VJEPA2Config
from mstar.models.vjepa2.encoder import Encoder
from mstar.models.vjepa2.layout import Published
from mstar.models.vjepa2.predictor import Predictor
from mstar.models.vjepa2.preprocess import pixels

__all__ = [
    "BLOCKS",
    "VJEPA2",
    "AcNetworks",
    "find_config",
    "load_ac_networks",
    "load_networks",
]

# Names of what is quantised: matrices of the transformers, not of the classifier.
BLOCKS = r"^(predictor_)?blocks\.\d+\.(attn|mlp)\."
_Networks = TypeVar("_Networks", bound=nn.Module)

_WIDTH = ("encoder.patch_embed.proj.bias", "encoder.embeddings.patch_embeddings.proj.bias")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
_HEAD = ("linear.bias", "classifier.bias")


class VJEPA2(nn.Module):
    """Encoder and predictor, and the classifier of a checkpoint that has one."""

    def __init__(self, config: VJEPA2Config, pooler_heads: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.predictor = Predictor(config)
        self.classifier: Classifier | None = None
        if config.labels:
            sizes = config.pooler(pooler_heads)
            self.classifier = Classifier(sizes, config.num_pooler_layers, len(config.labels))


class AcNetworks(nn.Module):
    """Encoder and predictor of V-JEPA 2-AC."""

    def __init__(self, config: AcConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.predictor = AcPredictor(config)

    @property
    def device(self) -> torch.device:
        return self.predictor.predictor_norm.weight.device

    def pixels(self, frames: Tensor) -> Tensor:
        """What is encoded of square frames uint8 `[frames, 3, side, side]`."""
        return pixels(frames, self.config.img_size)

    def encode_frames(self, pixels: Tensor) -> Tensor:
        """Latents `[frames, patches, embed_dim]` of pixels, those of each frame by itself as a clip
        in which nothing moves, normed."""
        return self.predictor.norm(self.encoder.encode_static(pixels))

    def encode_clip(self, pixels: Tensor) -> Tensor:
        """Latents `[times, patches, embed_dim]` of one clip, not normed."""
        return self.encoder(pixels.unsqueeze(0))[0].unflatten(0, (-1, self.config.patches))


def find_config(folder: Path, size: str | None = None) -> VJEPA2Config:
    """What the files in `folder` describe. The original files have no config: theirs is the
    published one of that width, or of the file's name.

    Args:
        size: one of `PUBLISHED`, instead.

    Raises:
        WeightsError: a file is missing or wrong.
    """
    path = folder / "config.json"
    if size is None and path.is_file():
        try:
            return VJEPA2Config.from_file(path)
        except (OSError, TypeError, ValueError) as error:
            raise WeightsError(f"cannot use {path}: {error}") from error
    if not folder.is_dir():
        raise WeightsError(f"there is no folder {folder}")
    has_weights = any(file.suffix in _WEIGHTS for file in folder.iterdir())
    if not has_weights and size is not None:
        return PUBLISHED[size]
    published = Published(folder)
    config = PUBLISHED[size] if size is not None else _of_width(published, folder)
    return replace(config, labels=_numbered(published))


def load_networks(
    folder: Path, *, config: VJEPA2Config | None = None, pooler_heads: int | None = None, **how: Any
) -> VJEPA2:
    """Networks of a config, by default that of the folder, as `filled` has them."""
    with torch.device("meta"):
        networks = VJEPA2(config or find_config(folder), pooler_heads)
    return _filled(networks, folder, **how)


def load_ac_networks(folder: Path, *, config: AcConfig | None = None, **how: Any) -> AcNetworks:
    """Networks of a config, by default that of the folder, as `filled` has them."""
    with torch.device("meta"):
        networks = AcNetworks(config or AcConfig.from_folder(folder))
    return _filled(networks, folder, **how)


def _filled(networks: _Networks, folder: Path, **how: Any) -> _Networks:
    checkpoint = cache(lambda: Published(folder))
    for network in networks.children():
        filled(network, checkpoint, **how)
    return networks.eval()


def _of_width(published: Published, folder: Path) -> VJEPA2Config:
    name = next((name for name in _WIDTH if name in published), None)
    if name is None:
        raise WeightsError(f"{published} holds no encoder of V-JEPA 2")
    width = published.shape(name)[0]
    named = [PUBLISHED[file.stem] for file in folder.iterdir() if file.stem in PUBLISHED]
    for config in (*named, *PUBLISHED.values()):
        if config.hidden_size == width:
            return config
    raise WeightsError(f"{published} has no config.json, and no published one has width {width}")


def _numbered(published: Published) -> tuple[str, ...]:
    """Labels of a classifier whose names nobody told."""
    name = next((name for name in _HEAD if name in published), None)
    count = 0 if name is None else published.shape(name)[0]
    return tuple(f"LABEL_{index}" for index in range(count))
