"""SNAC's published config.json, and the arithmetic of rates and reach that follows from it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any

from mstar.models.fields import (
    check_fields,
    check_multiple,
    check_sizes,
    known,
    read_object,
    required,
)

__all__ = ["DILATIONS", "REACH", "TAPS", "SnacConfig"]

TAPS = 7  # of every convolution that is neither 1x1 nor transposed
REACH = TAPS // 2
DILATIONS = (1, 3, 9)  # of the residual units of a block
_Count = int  # which may be 0


@dataclass(frozen=True)
class SnacConfig:
    """The fields of config.json, under their published names.

    Raises:
        ValueError: the model has local attention (the 32 and 44 kHz models), strides that do not
            divide the first one, or a value that no codec can have.
    """

    sampling_rate: int  # Hz
    encoder_dim: int
    encoder_rates: tuple[int, ...]
    decoder_dim: int
    decoder_rates: tuple[int, ...]
    codebook_size: int
    codebook_dim: int
    vq_strides: tuple[int, ...]
    noise: bool = True
    depthwise: bool = True
    attn_window_size: int | None = None
    latent_dim: _Count = 0  # 0 or absent: encoder_dim doubled at each rate

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.latent_dim:
            object.__setattr__(self, "latent_dim", self.encoder_dim << len(self.encoder_rates))
        check_sizes(vars(self), ("latent_dim",))
        halvings = len(self.decoder_rates)
        why = f"since each of the {halvings} decoder blocks halves it"
        check_multiple(vars(self), "decoder_dim", 2**halvings, why)
        if self.attn_window_size is not None:
            raise ValueError(
                f"attn_window_size={self.attn_window_size}: SNAC models with local attention are "
                "not supported, only null is"
            )
        if any(self.vq_strides[0] % stride for stride in self.vq_strides):
            raise ValueError(f"vq_strides={list(self.vq_strides)}: each must divide the first")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SnacConfig:
        """From the content of config.json; entries that are not the codec's are ignored."""
        required(values, (f.name for f in fields(cls) if f.default is MISSING))
        return cls(**known(cls, values))

    @classmethod
    def from_file(cls, path: str | Path) -> SnacConfig:
        """From a config.json."""
        return cls.from_dict(read_object(path))

    @property
    def frame_samples(self) -> int:
        """Samples in one frame: the span of one code of the slowest level."""
        return self.vq_strides[0] * prod(self.decoder_rates)

    @property
    def block_steps(self) -> list[int]:
        """Time steps per frame at the output of each decoder block."""
        return [
            self.vq_strides[0] * prod(self.decoder_rates[: i + 1])
            for i in range(len(self.decoder_rates))
        ]

    def noise_lengths(self, frames: int) -> list[int]:
        """Time steps of the noise of each block for `frames` frames; empty without noise."""
        return [frames * steps for steps in self.block_steps] if self.noise else []

    @cached_property
    def context_frames(self) -> int:
        """Frames on each side that a frame's samples depend on: with so many, they are exact."""
        far = 1_000  # a frame in the middle of a signal without ends
        spans = self.spans(2 * far, far, far + 1)
        lo, hi = spans[0][0] - REACH, spans[0][1] + REACH
        stride = self.vq_strides[0]
        return max(far - lo // stride, ceil(hi / stride) - far - 1)

    def width(self, block: int) -> int:
        """Channels at the input of a decoder block (or, one past the last, of the output)."""
        return self.decoder_dim >> block

    def spans(self, frames: int, lo: int, hi: int) -> list[tuple[int, int]]:
        """The time steps that frames lo to hi - 1 of a signal of `frames` need of every stage.

        Returns:
            (first, last + 1) at the input of each decoder block and at the output of the last.
            A convolution spoils REACH · dilation steps at an end that is cut, so each span is
            that much wider than what comes after it needs, where the signal goes on.
        """
        unit = sum(REACH * dilation for dilation in DILATIONS)
        steps = [self.vq_strides[0], *self.block_steps]
        first, last = lo * self.frame_samples - REACH, hi * self.frame_samples + REACH
        spans = []
        for n, rate in zip(reversed(steps), (*reversed(self.decoder_rates), 0), strict=True):
            if rate:
                first, last = first - unit, last + unit
            first, last = max(0, first), min(n * frames, last)
            spans.append((first, last))
            if (
                rate
            ):  # output step t comes from input steps ceil((t + p + 1) / r) - 2 .. (t + p) // r
                pad = (rate + 1) // 2
                first, last = -(-(first + pad + 1) // rate) - 2, (last - 1 + pad) // rate + 1
        return spans[::-1]
