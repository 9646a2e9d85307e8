"""Rotary position embedding (RoFormer, Su et al. 2021, section 3.4.2) and its scalings.

The half-split layout: dimension i of a head is paired with dimension i + head_dim / 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rotary", "inverse_frequencies", "rotate"]


class Rotary:
    """Angles of one network's rotary embedding.

    Args:
        head_dim: size of a head.
        theta: base of the frequencies.
        scaling: the `rope_scaling` (or `rope_parameters`) of a published config.json.
    """

    def __init__(
        self, head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None
    ) -> None:
        with torch.device("cpu"):
            self.inv_freq, self.factor = inverse_frequencies(head_dim, theta, scaling)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 `[tokens, head_dim / 2]`, of positions `[tokens]`."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angle = positions.float().unsqueeze(-1) * self.inv_freq
        if self.factor == 1.0:
            return angle.cos(), angle.sin()
        return angle.cos() * self.factor, angle.sin() * self.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads `[tokens, heads, head_dim]` by angles `[tokens, head_dim / 2]`, in float32."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[Tensor, float]:
    """Frequencies float32 `[head_dim / 2]` in radians per position, and a factor on cos and sin.

    Raises:
        ValueError: a kind of scaling that is not one of default, linear, llama3, yarn, or a number
            of it that is missing or makes no sense.
    """
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = _number({"rope_theta": theta, **scaling}, "rope_theta", above=1)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    base = 1.0 / (theta**exponents)
    if kind == "default":
        return base, 1.0
    if kind == "linear":
        return base / _number(scaling, "factor"), 1.0
    if kind == "llama3":
        return _llama3(base, scaling), 1.0
    if kind == "yarn":
        return _yarn(base, head_dim, theta, scaling)
    raise ValueError(f"rope_type={kind!r}: must be one of default, linear, llama3, yarn")


def _llama3(base: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, others blended."""
    factor, low = _number(scaling, "factor"), _number(scaling, "low_freq_factor")
    high = _number(scaling, "high_freq_factor", above=low)
    original = _number(scaling, "original_max_position_embeddings")
    wavelength = 2 * math.pi / base
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * base / factor + blend * base
    scaled = torch.where(wavelength > original / low, base / factor, blended)
    return torch.where(wavelength < original / high, base, scaled)


def _yarn(
    base: Tensor, head_dim: int, theta: float, scaling: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023), section 3.2 for the frequencies and equation 22 for the factor."""
    factor = _number(scaling, "factor")
    original = _number(scaling, "original_max_position_embeddings")

    def dimension_of(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(_number(scaling, "beta_fast", 32))
    high = dimension_of(_number(scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2).float() - low) / span).clamp(0, 1)
    if scaling.get("attention_factor") is not None:
        attention = _number(scaling, "attention_factor")
    else:
        attention = _yarn_attention(scaling, factor)
    return base / factor * ramp + base * (1 - ramp), attention


def _yarn_attention(scaling: Mapping[str, Any], factor: float) -> float:
    def term(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        return term(1.0)
    return term(_number(scaling, "mscale")) / term(_number(scaling, "mscale_all_dim"))


def _number(
    scaling: Mapping[str, Any], key: str, default: float | None = None, *, above: float = 0
) -> float:
    """A finite number of the scaling that is greater than `above`."""
    value = scaling.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{key} is missing in the rotary scaling {dict(scaling)}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not above < value < math.inf:
        raise ValueError(f"{key}={value!r} in the rotary scaling: must be a number above {above}")
    return float(value)
