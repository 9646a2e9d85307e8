"""The published config.json of V-JEPA 2 (arXiv 2506.09985), and the published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mstar.models.fields import check_fields, check_sizes, check_values, known, read_object

__all__ = ["PUBLISHED", "BlockSizes", "EncoderSizes", "VJEPA2Config", "mlp_width"]


def mlp_width(width: int, ratio: float) -> int:
    """Width of an MLP's hidden layer, as published: the product, truncated."""
    return int(width * ratio)


@dataclass(frozen=True)
class BlockSizes:
    """One transformer block: width of its tokens, heads, hidden layer of its MLP. Values that no
    such block can have raise ValueError."""

    width: int
    heads: int
    hidden: int
    eps: float = 1e-6
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.width % self.heads:
            raise ValueError(f"width {self.width}: must be a multiple of the {self.heads} heads")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class EncoderSizes:
    """The encoder: its blocks, and the pixels and frames of one token."""

    blocks: BlockSizes
    depth: int
    patch_size: int = 16
    tubelet_size: int = 2


@dataclass(frozen=True)
class VJEPA2Config:
    """Names and defaults are those of the published files; `labels` are a classifier's, if there is
    one. Values that no such model can have raise ValueError."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: float = 4.0
    crop_size: int = 256
    frames_per_clip: int = 64
    patch_size: int = 16
    tubelet_size: int = 2
    in_chans: int = 3
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    pred_hidden_size: int = 384
    pred_num_attention_heads: int = 12
    pred_num_hidden_layers: int = 12
    pred_mlp_ratio: float = 4.0
    pred_num_mask_tokens: int = 10
    num_pooler_layers: int = 3
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        check_values(vars(self), hidden_act="gelu", in_chans=3)
        if self.crop_size < self.patch_size:
            raise ValueError(f"crop_size={self.crop_size}: must hold a patch of {self.patch_size}")
        _ = self.encoder, self.predictor, self.pooler(None)  # their own checks

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VJEPA2Config:
        """From the object in a config.json; fields that are not there have the defaults."""
        values = {**known(cls, config), "labels": ()}
        if any("Classification" in str(name) for name in config.get("architectures") or ()):
            values["labels"] = _labels(config)
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> VJEPA2Config:
        """From a config.json. Raises OSError or ValueError."""
        return cls.from_dict(read_object(path))

    @property
    def encoder(self) -> EncoderSizes:
        hidden = mlp_width(self.hidden_size, self.mlp_ratio)
        blocks = self._blocks(self.hidden_size, self.num_attention_heads, hidden)
        return EncoderSizes(blocks, self.num_hidden_layers, self.patch_size, self.tubelet_size)

    @property
    def predictor(self) -> BlockSizes:
        hidden = mlp_width(self.pred_hidden_size, self.pred_mlp_ratio)
        return self._blocks(self.pred_hidden_size, self.pred_num_attention_heads, hidden)

    def pooler(self, heads: int | None) -> BlockSizes:
        """Sizes of the classifier's blocks, with as many heads as the encoder, as transformers has
        it, or others: the probes on ViT-g were trained with 16."""
        size = self.hidden_size  # its MLP has four times the width, whatever `mlp_ratio` is
        heads = self.num_attention_heads if heads is None else heads
        return BlockSizes(size, heads, 4 * size, self.layer_norm_eps)

    @property
    def grid(self) -> int:
        """Patches along a side of a whole crop."""
        return self.crop_size // self.patch_size

    def _blocks(self, width: int, heads: int, hidden: int) -> BlockSizes:
        return BlockSizes(width, heads, hidden, self.layer_norm_eps, self.qkv_bias)


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label")
    if not names:
        count = config.get("num_labels", 2)  # transformers' default
        check_sizes({"num_labels": count}, ["num_labels"])
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(names, Mapping) or {str(i) for i in range(len(names))} != {*map(str, names)}:
        raise ValueError("id2label: must name the classes from 0 on")
    return tuple(str(names.get(str(i), names.get(i))) for i in range(len(names)))


_GIANT = VJEPA2Config(1408, 40, 22, 48 / 11)
# As the original repository calls them.
PUBLISHED: dict[str, VJEPA2Config] = {
    "vitl": VJEPA2Config(),
    "vith": VJEPA2Config(hidden_size=1280, num_hidden_layers=32),
    "vitg": _GIANT,
    "vitg-384": replace(_GIANT, crop_size=384),
}
