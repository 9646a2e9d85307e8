"""The networks of a checkpoint together, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mstar.engine.weights import load, randomize
from mstar.errors import InvalidRequest, WeightsError, nearest
from mstar.models.vjepa2.classifier import Classifier
from mstar.models.vjepa2.config import PUBLISHED, VJEPA2Config
from mstar.models.vjepa2.encoder import Encoder
from mstar.models.vjepa2.layout import Published
from mstar.models.vjepa2.predictor import Predictor

__all__ = ["VJEPA2", "find_config", "load_networks"]

_WIDTH = ("encoder.patch_embed.proj.bias", "encoder.embeddings.patch_embeddings.proj.bias")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
_HEAD = ("linear.bias", "classifier.bias")


class VJEPA2(nn.Module):
    """Encoder and predictor, and the classifier of a checkpoint that has one.

    Args:
        pooler_heads: of the classifier, if not as many as the encoder's.
    """

    def __init__(self, config: VJEPA2Config, pooler_heads: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.predictor = Predictor(config)
        self.classifier: Classifier | None = None
        if config.labels:
            sizes = config.pooler(pooler_heads)
            self.classifier = Classifier(sizes, config.num_pooler_layers, len(config.labels))


def find_config(folder: Path, size: str | None = None) -> VJEPA2Config:
    """What the files in `folder` describe. The original files have no config: theirs is the
    published one of that width, or of the file's name.

    Args:
        size: one of `PUBLISHED`, instead.

    Raises:
        InvalidRequest: `size` is none of them. WeightsError: a file is missing or wrong.
    """
    if size is not None and size not in PUBLISHED:
        allowed = f"must be one of {', '.join(PUBLISHED)}{nearest(str(size), PUBLISHED)}"
        raise InvalidRequest("options.size", size, allowed)
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
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    config: VJEPA2Config | None = None,
    pooler_heads: int | None = None,
    dummy: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> VJEPA2:
    """Networks with their weights, or with random ones if they are a `dummy`.

    Args:
        config: `find_config(folder)` if left out.
        pooler_heads: see `VJEPA2`.

    Raises:
        WeightsError: a file is missing or wrong, or lacks a tensor.
    """
    config = config or find_config(folder)
    with torch.device("meta"):
        networks = VJEPA2(config, pooler_heads)
    if dummy:
        return randomize(networks, device=device, dtype=dtype).eval()
    checkpoint = Published(folder)
    for network in filter(None, (networks.encoder, networks.predictor, networks.classifier)):
        load(network, checkpoint, device=device, dtype=dtype, progress=progress)
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
