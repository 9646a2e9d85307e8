"""Sizes of V-JEPA 2-AC (arXiv 2506.09985, section 4): an encoder and an action-conditioned
predictor. The published file has no config.json: the defaults are its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mstar.errors import WeightsError
from mstar.models.fields import check_fields, known, read_object
from mstar.models.vjepa2.config import BlockSizes, EncoderSizes, mlp_width

__all__ = ["EXTRINSICS", "AcConfig"]

EXTRINSICS = 6  # numbers that describe where a camera is


@dataclass(frozen=True)
class AcConfig:
    """Names are those of the tiny checkpoint's config.json.

    Args:
        img_size: height and width of a frame in pixels.
        num_frames: frames of video in training's longest clip; there are `num_frames //
            tubelet_size` steps of time.
        use_extrinsics: whether every frame has a token for its camera.
        action_embed_dim: numbers of an action and of a state.
        reps_layer_norm_eps: of the layer norm after the encoder and after the predictor.

    Values that no such model can have raise ValueError.
    """

    img_size: tuple[int, ...] = (256, 256)
    patch_size: int = 16
    num_frames: int = 64
    tubelet_size: int = 2
    embed_dim: int = 1408
    depth: int = 40
    num_heads: int = 22
    mlp_ratio: float = 48 / 11
    pred_embed_dim: int = 1024
    pred_depth: int = 24
    pred_num_heads: int = 16
    pred_mlp_ratio: float = 4.0
    use_extrinsics: bool = False
    action_embed_dim: int = 7
    layer_norm_eps: float = 1e-6
    reps_layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.img_size) != 2 or any(side % self.patch_size for side in self.img_size):
            allowed = f"must be height and width, multiples of {self.patch_size}"
            raise ValueError(f"img_size={self.img_size}: {allowed}")
        if self.action_embed_dim != 7:
            raise ValueError(f"action_embed_dim={self.action_embed_dim}: must be 7")
        _ = self.encoder, self.predictor  # their own checks

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AcConfig:
        """From the object in a config.json; what is not there is as published."""
        return cls(**known(cls, config))

    @classmethod
    def from_folder(cls, folder: Path) -> AcConfig:
        """From its config.json; without one, as published. Raises WeightsError."""
        path = folder / "config.json"
        try:
            return cls.from_dict(read_object(path)) if path.exists() else cls()
        except (OSError, TypeError, ValueError) as error:
            raise WeightsError(f"cannot use {path}: {error}") from error

    @property
    def encoder(self) -> EncoderSizes:
        hidden = mlp_width(self.embed_dim, self.mlp_ratio)
        blocks = BlockSizes(self.embed_dim, self.num_heads, hidden, self.layer_norm_eps)
        return EncoderSizes(blocks, self.depth, self.patch_size, self.tubelet_size)

    @property
    def predictor(self) -> BlockSizes:
        hidden = mlp_width(self.pred_embed_dim, self.pred_mlp_ratio)
        return BlockSizes(self.pred_embed_dim, self.pred_num_heads, hidden, self.layer_norm_eps)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.img_size
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def conditions(self) -> int:
        """Tokens before the patches of a frame: action, state, and the camera's."""
        return 3 if self.use_extrinsics else 2

    @property
    def max_frames(self) -> int:
        """Most steps of time that the predictor takes."""
        return self.num_frames // self.tubelet_size
