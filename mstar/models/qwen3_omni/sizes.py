"""The sizes of the networks that Qwen3-Omni is made of, from the parts of its config.json.

The defaults of the published code are not the published values, so nothing is optional that
changes a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from math import isqrt, prod
from typing import Any, TypeVar

from mstar.models.fields import (
    check_fields,
    check_lists,
    check_multiple,
    check_sizes,
    check_values,
    known,
    object_of,
    required,
)

__all__ = ["AudioConfig", "DecoderConfig", "VisionConfig", "VocoderConfig", "made"]

_T = TypeVar("_T")
_Count = int  # which may be 0


@dataclass(frozen=True)
class AudioConfig:
    """The audio encoder: `audio_config`.

    Args:
        n_window: half of the frames of a chunk.
        n_window_infer: frames that attend to each other.

    Raises:
        ValueError: a value that no such network can have.
    """

    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    downsample_hidden_size: int
    output_dim: int
    n_window: int
    n_window_infer: int
    num_mel_bins: int

    def __post_init__(self) -> None:
        check_fields(self)
        check_multiple(vars(self), "d_model", 2 * self.encoder_attention_heads, "twice the heads")
        check_multiple(vars(self), "n_window_infer", self.chunk, "the frames of a chunk")
        if self.d_model < 4:
            raise ValueError(f"d_model={self.d_model}: must be at least 4, for positions")

    @property
    def chunk(self) -> int:
        """Frames of a chunk."""
        return 2 * self.n_window

    @property
    def bands(self) -> int:
        """Rows that three convolutions leave of the mel bands."""
        return _thrice_halved(self.num_mel_bins)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a whole chunk."""
        return _thrice_halved(self.chunk)

    @property
    def window(self) -> int:
        """Tokens that attend to each other."""
        return self.chunk_tokens * (self.n_window_infer // self.chunk)

    def tokens(self, frames: int) -> int:
        """Tokens of a clip."""
        whole, rest = divmod(frames, self.chunk)
        return whole * self.chunk_tokens + _thrice_halved(rest)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AudioConfig:
        """Read an `audio_config`."""
        check_values(config, activation_function="gelu", scale_embedding=False)
        return made(cls, config)


def _thrice_halved(size: int) -> int:
    """What three convolutions of stride 2, padded by 1, leave of a side."""
    for _ in range(3):
        size = (size + 1) // 2
    return size


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: `vision_config`.

    Args:
        num_position_embeddings: rows of the table of positions, a square.
        deepstack_visual_indexes: layers after which features are taken for the decoder's first
            layers.

    Raises:
        ValueError: a value that no such network can have.
    """

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    in_channels: int = 3

    def __post_init__(self) -> None:
        values, why = vars(self), "for rotary positions in two dimensions"
        check_sizes(values, [name for name in values if name != "deepstack_visual_indexes"])
        check_multiple(values, "hidden_size", 4 * self.num_heads, why)
        check_values(values, in_channels=3)
        if self.side**2 != self.num_position_embeddings:
            raise ValueError(
                f"num_position_embeddings={self.num_position_embeddings}: must be a square"
            )
        taken = self.deepstack_visual_indexes
        if list(taken) != sorted(set(taken)) or any(not 0 <= i < self.depth for i in taken):
            raise ValueError(
                f"deepstack_visual_indexes={list(taken)}: must rise within the {self.depth} layers"
            )

    @property
    def side(self) -> int:
        """Rows and columns of the table of positions."""
        return isqrt(self.num_position_embeddings)

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged(self) -> int:
        """Patches of a token."""
        return self.spatial_merge_size**2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VisionConfig:
        """Read a `vision_config`."""
        check_values(config, hidden_act="gelu_pytorch_tanh", apply_vit_abs_pos_embed=True)
        return made(cls, config)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder: the `text_config` of Thinker or Talker, or the `code_predictor_config`.

    Args:
        mrope_section: frequencies of the axes t, h, w; `None` for positions of one axis.
        num_experts: of each layer; 0 for a plain MLP of `intermediate_size`.
        shared_expert_intermediate_size: of the expert that every token goes through; 0 for none.

    Raises:
        ValueError: a value that no such network can have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    mrope_section: tuple[int, ...] | None = None
    num_experts: _Count = 0
    num_experts_per_tok: _Count = 0
    moe_intermediate_size: _Count = 0
    norm_topk_prob: bool = True
    shared_expert_intermediate_size: _Count = 0

    def __post_init__(self) -> None:
        check_fields(self)
        values = vars(self)
        if self.num_experts:
            check_sizes(values, ("num_experts", "num_experts_per_tok", "moe_intermediate_size"))
            if self.num_experts_per_tok > self.num_experts:
                raise ValueError(
                    f"num_experts_per_tok={self.num_experts_per_tok}: there are "
                    f"{self.num_experts} experts"
                )
        if self.shared_expert_intermediate_size:
            check_sizes(values, ("shared_expert_intermediate_size",))
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads}: must divide the {heads} heads")
        check_multiple(values, "head_dim", 2, "for rotary positions")
        if self.mrope_section is not None:
            check_lists(values, ("mrope_section",))
            if len(self.mrope_section) != 3 or sum(self.mrope_section) != self.head_dim // 2:
                raise ValueError(
                    f"mrope_section={list(self.mrope_section)}: must be three numbers that add up "
                    f"to {self.head_dim // 2}, half of a head"
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read one.

        Raises:
            ValueError: it describes another kind of network, or none.
        """
        check_values(config, hidden_act="silu", attention_bias=False, tie_word_embeddings=False)
        check_values(config, use_sliding_window=False, decoder_sparse_step=1, mlp_only_layers=[])
        rope = _rope(config)
        if rope.get("mrope_section") is not None:
            check_values(rope, interleaved=True, mrope_interleaved=True)
        more = {
            "num_experts": config.get("num_local_experts"),
            "mrope_section": rope.get("mrope_section"),
        }
        given = {name: value for name, value in more.items() if config.get(name) is None}
        return made(cls, {"rope_theta": rope.get("rope_theta"), **config, **given})


@dataclass(frozen=True)
class VocoderConfig:
    """The vocoder: `code2wav_config`.

    Args:
        sliding_window: frames that a frame sees, itself among them.
        upsampling_ratios: of the stages after the transformer, which keep the width.
        upsample_rates: of the decoder's blocks, each of which halves the width.

    Raises:
        ValueError: a value that no such network can have.
    """

    codebook_size: int
    num_quantizers: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    sliding_window: int
    rms_norm_eps: float
    rope_theta: float
    upsampling_ratios: tuple[int, ...]
    upsample_rates: tuple[int, ...]
    decoder_dim: int

    def __post_init__(self) -> None:
        check_fields(self)
        values, halvings = vars(self), len(self.upsample_rates)
        unit = 2 * self.num_attention_heads
        check_multiple(values, "hidden_size", unit, "for heads of an even size")
        check_multiple(values, "decoder_dim", 2**halvings, f"to be halved {halvings} times")

    @property
    def frame_samples(self) -> int:
        """Samples per frame."""
        return prod(self.upsampling_ratios) * prod(self.upsample_rates)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VocoderConfig:
        """Read a `code2wav_config`."""
        check_values(config, hidden_act="silu", attention_bias=False)
        check_values(config, num_key_value_heads=config.get("num_attention_heads"))
        return made(cls, {"rope_theta": _rope(config).get("rope_theta"), **config})


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_scaling`, or `rope_parameters` as newer files have it, of the usual kind."""
    rope = object_of(config, "rope_scaling") or object_of(config, "rope_parameters")
    check_values(rope, rope_type="default")
    return rope


def made(kind: type[_T], config: Mapping[str, Any]) -> _T:
    """A dataclass of the entries that it knows; those that are null count as left out.

    Raises:
        ValueError: one that is needed is missing.
    """
    required(config, [field.name for field in fields(kind) if field.default is MISSING])
    return kind(**known(kind, config))
