"""The sizes of BAGEL, from llm_config.json, vit_config.json and config.json.

The published config.json was written later, for other frameworks, and its `max_latent_size` is
wrong: that one comes from the weights (see `networks.py`). Whatever a file leaves out has the value
of the published model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mstar.models.bagel.resize import ResizeRule
from mstar.models.fields import check_lists, check_numbers, check_sizes, read_object

__all__ = ["BagelConfig", "LLMConfig", "VAEConfig", "ViTConfig"]

_T = TypeVar("_T")

_GROUPS = 32  # of the autoencoder's group norms
_VAE_RULE = ResizeRule(1024, 512, 16)
_VIT_RULE = ResizeRule(980, 224, 14)


@dataclass(frozen=True)
class LLMConfig:
    """The decoder: llm_config.json.

    Raises:
        ValueError: a value that no such network can have.
    """

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
        values = vars(self)
        check_sizes(values, [name for name in values if name not in ("rms_norm_eps", "rope_theta")])
        check_numbers(values, ("rms_norm_eps", "rope_theta"))
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be a multiple of {2 * heads}, for heads of "
                "an even size"
            )
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads}: must divide the {heads} heads")

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LLMConfig:
        """Read an llm_config.json.

        Raises:
            ValueError: it describes another kind of network, or none.
        """
        _demand(config, "hidden_act", "silu")
        _demand(config, "qk_norm", True)
        _demand(config, "tie_word_embeddings", False)
        _demand(config, "use_sliding_window", False)
        _demand(config, "rope_scaling", None)
        return _known(cls, config)


@dataclass(frozen=True)
class ViTConfig:
    """The vision encoder: vit_config.json.

    Args:
        num_hidden_layers: as in the file, which counts one layer more than there is.

    Raises:
        ValueError: a value that no such network can have.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_attention_heads: int = 16
    num_hidden_layers: int = 27
    num_channels: int = 3
    patch_size: int = 14
    image_size: int = 980
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        values = vars(self)
        check_sizes(values, [name for name in values if name != "layer_norm_eps"])
        check_numbers(values, ("layer_norm_eps",))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be a multiple of the "
                f"{self.num_attention_heads} heads"
            )
        if self.num_hidden_layers < 2:
            raise ValueError("num_hidden_layers=1: must be 2 or more, since the last is not used")
        if self.num_channels != 3:
            raise ValueError(f"num_channels={self.num_channels}: must be 3, for RGB")

    @property
    def layers(self) -> int:
        """Layers that exist."""
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
        """Read a vit_config.json.

        Raises:
            ValueError: it describes another kind of network, or none.
        """
        _demand(config, "model_type", "siglip_vision_model")
        _demand(config, "hidden_act", "gelu_pytorch_tanh")
        return _known(cls, config)


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder: `vae_config` in config.json.

    Raises:
        ValueError: a value that no such network can have.
    """

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        values = vars(self)
        sizes = ("in_channels", "out_ch", "ch", "num_res_blocks", "z_channels")
        check_sizes(values, sizes)
        check_lists(values, ("ch_mult",))
        check_numbers(values, ("scale_factor", "shift_factor"))
        if self.ch % _GROUPS:
            raise ValueError(f"ch={self.ch}: must be a multiple of {_GROUPS}, the groups of a norm")
        for name in ("in_channels", "out_ch"):
            if values[name] != 3:
                raise ValueError(f"{name}={values[name]}: must be 3, for RGB")

    @property
    def downsample(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VAEConfig:
        """Read the `vae_config` of a config.json.

        Raises:
            ValueError: it describes another kind of network, or none.
        """
        if isinstance(config.get("ch_mult"), list):
            config = {**config, "ch_mult": tuple(config["ch_mult"])}
        found = _known(cls, config)
        _demand(config, "downsample", found.downsample)
        return found


@dataclass(frozen=True)
class BagelConfig:
    """The whole model.

    Args:
        llm, vit, vae: its networks.
        latent_patch_size: latents per token, along each side.
        vit_max_num_patch_per_side: patches along the sides of the tables of positions.
        vae_rule, vit_rule: the sizes of images for the autoencoder and for the vision encoder.

    Raises:
        ValueError: parts that do not fit each other.
    """

    llm: LLMConfig = field(default_factory=LLMConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    latent_patch_size: int = 2
    vit_max_num_patch_per_side: int = 70
    vae_rule: ResizeRule = _VAE_RULE
    vit_rule: ResizeRule = _VIT_RULE

    def __post_init__(self) -> None:
        check_sizes(vars(self), ("latent_patch_size", "vit_max_num_patch_per_side"))
        side = self.vit_max_num_patch_per_side
        if side**2 > self.vit.positions:
            raise ValueError(
                f"vit_max_num_patch_per_side={side}: the vision encoder has positions for "
                f"{self.vit.positions} patches only"
            )
        for name, rule, unit, most in (
            ("vae", self.vae_rule, self.latent_downsample, None),
            ("vit", self.vit_rule, self.vit.patch_size, side),
        ):
            if rule.stride % unit:
                raise ValueError(
                    f"image_transforms.{name}.stride={rule.stride}: must be a multiple of {unit}, "
                    "the pixels of a token"
                )
            if most is not None and rule.max_size // unit > most:
                raise ValueError(
                    f"image_transforms.{name}.max_size={rule.max_size}: there are positions for "
                    f"{most} patches of {unit} pixels only"
                )

    @property
    def latent_downsample(self) -> int:
        """Pixels per latent token, along each side."""
        return self.vae.downsample * self.latent_patch_size

    @property
    def patch_latent_dim(self) -> int:
        """Values of one latent token."""
        return self.latent_patch_size**2 * self.vae.z_channels

    @classmethod
    def from_dicts(
        cls, llm: Mapping[str, Any], vit: Mapping[str, Any], top: Mapping[str, Any]
    ) -> BagelConfig:
        """Put together the contents of llm_config.json, vit_config.json and config.json.

        Raises:
            ValueError: they describe another kind of network, or none.
        """
        _demand(top, "connector_act", "gelu_pytorch_tanh")
        _demand(top, "interpolate_pos", False)
        names = ("latent_patch_size", "vit_max_num_patch_per_side")
        rules = _object(top, "image_transforms")
        return cls(
            llm=_of("llm_config.json: ", LLMConfig.from_dict, llm),
            vit=_of("vit_config.json: ", ViTConfig.from_dict, vit),
            vae=_of("vae_config.", VAEConfig.from_dict, _object(top, "vae_config")),
            **{name: top[name] for name in names if top.get(name) is not None},
            **{
                f"{name}_rule": _rule(rules, name, getattr(cls, f"{name}_rule"))
                for name in ("vae", "vit")
            },
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> BagelConfig:
        """Read the files of a checkpoint; only config.json may be missing.

        Raises:
            FileNotFoundError: one of the others is.
            ValueError: they describe another kind of network, or none.
        """
        found = {}
        for name in ("llm_config.json", "vit_config.json", "config.json"):
            file = Path(folder) / name
            if name == "config.json" and not file.exists():
                found[name] = {}
                continue
            try:
                found[name] = read_object(file)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return cls.from_dicts(*found.values())


def _known(cls: type[_T], config: Mapping[str, Any]) -> _T:
    """A dataclass of the entries that it knows; those that are null count as left out."""
    known = cls.__dataclass_fields__
    return cls(**{k: v for k, v in config.items() if k in known and v is not None})


def _demand(config: Mapping[str, Any], name: str, value: Any) -> None:
    found = config.get(name)
    if found is not None and found != value:
        raise ValueError(f"{name}={found!r}: must be {value!r}")


def _object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{name}={found!r}: must be an object")
    return found or {}


def _rule(rules: Mapping[str, Any], name: str, default: ResizeRule) -> ResizeRule:
    given = {k: v for k, v in _object(rules, name).items() if k in vars(default)}
    return _of(
        f"image_transforms.{name}.", lambda given: ResizeRule(**{**vars(default), **given}), given
    )


def _of(where: str, read: Callable[[Mapping[str, Any]], _T], found: Mapping[str, Any]) -> _T:
    """What `read` makes of it; its errors say where the fault is."""
    try:
        return read(found)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
