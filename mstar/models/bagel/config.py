"""The sizes of BAGEL, from llm_config.json, vit_config.json and config.json.

The published config.json was written later, for other frameworks, and its `max_latent_size` is
wrong: that one comes from the weights (see `networks.py`). Whatever a file leaves out has the value
of the published model. What no such network can have, or describes another, raises ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from mstar.models.bagel.pixels import ResizeRule
from mstar.models.fields import (
    check_fields,
    check_multiple,
    check_values,
    known,
    object_of,
    read_object,
)

__all__ = ["BagelConfig", "LLMConfig", "VAEConfig", "ViTConfig"]

_T = TypeVar("_T")

_GROUPS = 32  # of the autoencoder's group norms
_VAE_RULE = ResizeRule(1024, 512, 16)
_VIT_RULE = ResizeRule(980, 224, 14)


@dataclass(frozen=True)
class LLMConfig:
    """The decoder: llm_config.json."""

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6

    def __post_init__(self) -> None:
        check_fields(self)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        check_multiple(vars(self), "hidden_size", 2 * heads, "for heads of an even size")
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads}: must divide the {heads} heads")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LLMConfig:
        """Read an llm_config.json."""
        check_values(config, hidden_act="silu", qk_norm=True, tie_word_embeddings=False)
        check_values(config, use_sliding_window=False, rope_scaling=None)
        return cls(**known(cls, config))


@dataclass(frozen=True)
class ViTConfig:
    """The vision encoder: vit_config.json, which counts one layer more than there is."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_attention_heads: int = 16
    num_hidden_layers: int = 27
    num_channels: int = 3
    patch_size: int = 14
    image_size: int = 980
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self)
        check_multiple(vars(self), "hidden_size", self.num_attention_heads, "the heads")
        if self.num_hidden_layers < 2:
            raise ValueError("num_hidden_layers=1: must be 2 or more, since the last is not used")
        check_values(vars(self), num_channels=3)

    @property
    def layers(self) -> int:
        return self.num_hidden_layers - 1

    @property
    def patch_dim(self) -> int:
        """Values of one patch."""
        return self.patch_size**2 * self.num_channels

    @property
    def positions(self) -> int:
        """Rows of the table of positions."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ViTConfig:
        """Read a vit_config.json."""
        check_values(config, model_type="siglip_vision_model", hidden_act="gelu_pytorch_tanh")
        return cls(**known(cls, config))


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder: `vae_config` in config.json."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        check_fields(self)
        check_multiple(vars(self), "ch", _GROUPS, "the groups of a norm")
        check_values(vars(self), in_channels=3, out_ch=3)

    @property
    def downsample(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VAEConfig:
        """Read the `vae_config` of a config.json."""
        found = cls(**known(cls, config))
        check_values(config, downsample=found.downsample)
        return found


@dataclass(frozen=True)
class BagelConfig:
    """The whole model.

    Args:
        llm, vit, vae: its networks.
        latent_patch_size: latents per token, along each side.
        vit_max_num_patch_per_side: patches along the sides of the tables of positions.
        vae_rule, vit_rule: the sizes of images for the autoencoder and for the vision encoder.
    """

    llm: LLMConfig = field(default_factory=LLMConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    latent_patch_size: int = 2
    vit_max_num_patch_per_side: int = 70
    vae_rule: ResizeRule = _VAE_RULE
    vit_rule: ResizeRule = _VIT_RULE

    def __post_init__(self) -> None:
        check_fields(self)
        side = self.vit_max_num_patch_per_side
        if side**2 > self.vit.positions:
            why = f"the vision encoder has positions for {self.vit.positions} patches only"
            raise ValueError(f"vit_max_num_patch_per_side={side}: {why}")
        vae, vit, unit = self.vae_rule, self.vit_rule, self.vit.patch_size
        for name, rule, pixels in (("vae", vae, self.latent_downsample), ("vit", vit, unit)):
            if rule.stride % pixels:
                why = f"must be a multiple of {pixels}, the pixels of a token"
                raise ValueError(f"image_transforms.{name}.stride={rule.stride}: {why}")
        if vit.max_size // unit > side:
            why = f"there are positions for {side} patches of {unit} pixels only"
            raise ValueError(f"image_transforms.vit.max_size={vit.max_size}: {why}")

    @property
    def latent_downsample(self) -> int:
        """Pixels per latent token, along each side."""
        return self.vae.downsample * self.latent_patch_size

    @property
    def patch_latent_dim(self) -> int:
        """Values of one latent token."""
        return self.latent_patch_size**2 * self.vae.z_channels

    @classmethod
    def from_folder(cls, folder: str | Path) -> BagelConfig:
        """Read the files of a checkpoint; only config.json may be missing.

        Raises:
            FileNotFoundError: one of the others is.
        """

        def found(name: str) -> dict[str, Any]:
            return _of(f"{name}: ", read_object, Path(folder) / name)

        llm, vit = found("llm_config.json"), found("vit_config.json")
        top = found("config.json") if (Path(folder) / "config.json").exists() else {}
        check_values(top, connector_act="gelu_pytorch_tanh", interpolate_pos=False)
        names = ("latent_patch_size", "vit_max_num_patch_per_side")
        rules = object_of(top, "image_transforms")
        return cls(
            llm=_of("llm_config.json: ", LLMConfig.from_dict, llm),
            vit=_of("vit_config.json: ", ViTConfig.from_dict, vit),
            vae=_of("vae_config.", VAEConfig.from_dict, object_of(top, "vae_config")),
            vae_rule=_rule(rules, "vae", _VAE_RULE),
            vit_rule=_rule(rules, "vit", _VIT_RULE),
            **{name: top[name] for name in names if top.get(name) is not None},
        )


def _rule(rules: Mapping[str, Any], name: str, default: ResizeRule) -> ResizeRule:
    given = known(ResizeRule, object_of(rules, name))
    return _of(f"image_transforms.{name}.", lambda given: replace(default, **given), given)


def _of(where: str, read: Callable[[Any], _T], found: Any) -> _T:
    """What `read` makes of it; its errors say where the fault is."""
    try:
        return read(found)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
