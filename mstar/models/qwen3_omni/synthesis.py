"""The vocoder's convolutions: a row per frame -> samples.

All of them look back only, but a block of the decoder loses as many of its samples at the end as it
looks ahead. Modules and parameters are named as in the published files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.kernels.codec_conv import codec_conv, convolved
from mstar.engine.layers.linear import apply
from mstar.engine.weights import Source
from mstar.models.qwen3_omni.sizes import VocoderConfig

__all__ = ["Synthesis"]

_TAPS = 7
_REACH = _TAPS - 1
_DILATIONS = (1, 3, 9)


class Synthesis(nn.Module):
    """Rows `[batch, frames, hidden]` -> samples `[batch, samples]`.

    Attributes:
        tail: samples at the end of the last frame that need the next one.
        context: frames before the first wanted one that can be heard in what is made of it.
    """

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        size, width = config.hidden_size, config.decoder_dim
        rates = config.upsample_rates
        self.upsample = nn.ModuleList(
            nn.ModuleList([_Upsample(size, size, ratio, ratio), _ConvNeXt(size)])
            for ratio in config.upsampling_ratios
        )
        last = width >> len(rates)
        self.decoder = nn.ModuleList(
            [
                _Conv(size, width),
                *(_Block(width >> index, rate) for index, rate in enumerate(rates)),
                _Snake(last),
                _Conv(last, 1),
            ]
        )
        self.tail = 0
        for rate in rates:
            self.tail = (self.tail + 1) * rate
        self.context = max(0, -self._starts(-self.tail)[0])

    def sources(self, name: str) -> Sequence[Source]:
        """Where a parameter comes from in a published checkpoint."""
        path, leaf = name.rsplit(".", 1)
        if leaf == "alpha":
            return (Source((name,), lambda found: found[0].float().exp()),)
        if leaf == "inverse":
            names = (f"{path}.beta",)
            return (Source(names, lambda found: (found[0].float().exp() + 1e-9).reciprocal()),)
        return (Source((name,)),)

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:
        """Float32, -1 to 1.

        Args:
            skip: how many of the first frames only serve as context, and are not computed where
                they cannot be heard. With `context` of them, or all that there are, the samples are
                those that go on where a call for the frames before these has ended.

        Returns:
            `frames * frame_samples - tail` samples without `skip`, and otherwise the last
            `(frames - skip) * frame_samples` of them.
        """
        return self.stages(x, skip)[-1]

    def stages(self, x: Tensor, skip: int = 0) -> list[Tensor]:
        """What every stage gives, `[batch, channels, time]`, and at last the samples."""
        wanted = skip * self.config.frame_samples - self.tail if skip else 0
        *starts, last = self._starts(wanted)
        stem, *blocks, snake, out = self.decoder
        # Each layer of the decoder leaves the activation that the next one begins with.
        acts = [*(block.block[0] for block in blocks), snake]
        layers: list[Callable[[Tensor], tuple[Tensor, Tensor]]] = [
            *((lambda x, up=up, mix=mix: 2 * (mix(up(x)[0]),)) for up, mix in self.upsample),
            partial(stem.activated, after=acts[0]),
            *(partial(block, after=act) for block, act in zip(blocks, acts[1:], strict=True)),
            lambda x: 2 * (out(x),),
        ]
        rates = [*self.config.upsampling_ratios, 1, *self.config.upsample_rates, 1]
        found, begin = [], 0
        x = x.transpose(1, 2)
        for layer, start, rate in zip(layers, starts, rates, strict=True):
            start = max(start, 0)
            y, x = layer(x[:, :, start - begin :])
            begin = start * rate
            found.append(y)
        found.append(x[:, 0, max(last, 0) - begin :].float().clamp(-1, 1))
        return found

    def _starts(self, wanted: int) -> list[int]:
        """From which of its inputs on each stage needs them to make the samples from `wanted` on,
        and `wanted`."""
        starts = [wanted, wanted - _REACH]
        for rate in reversed(self.config.upsample_rates):
            starts.append((starts[-1] - _REACH * sum(_DILATIONS)) // rate)
        starts.append(starts[-1] - _REACH)
        for ratio in reversed(self.config.upsampling_ratios):
            starts.append((starts[-1] - _REACH) // ratio)
        return starts[::-1]


class _Filter(nn.Module):
    """Weights of a convolution."""

    def __init__(self, *shape: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(width))


class _Conv(nn.Module):
    """Taps `dilation` apart, the last of them at the sample itself."""

    def __init__(
        self, inputs: int, width: int, taps: int = _TAPS, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.dilation, self.groups = dilation, groups
        self.conv = _Filter(width, inputs // groups, taps, width=width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, ((self.conv.weight.shape[2] - 1) * self.dilation, 0))
        kernel = self.conv
        return convolved(x, kernel.weight, kernel.bias, dilation=self.dilation, groups=self.groups)

    def activated(
        self, x: Tensor, after: _Snake, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Its sum with a residual, and what `after` makes of that."""
        return codec_conv(
            x,
            self.conv.weight,
            self.conv.bias,
            dilation=self.dilation,
            residual=residual,
            activation=(after.alpha, after.inverse),
        )


class _Upsample(nn.Module):
    """A transposed convolution with stride `rate` and as many taps, or twice as many.

    With twice as many, the first and the last `rate` samples are dropped, which have one of their
    two inputs only.
    """

    def __init__(self, inputs: int, width: int, rate: int, taps: int) -> None:
        super().__init__()
        self.rate = rate
        self.conv = _Filter(inputs, width, taps, width=width)

    def forward(self, x: Tensor, after: _Snake | None = None) -> tuple[Tensor, Tensor | None]:
        """See `_Conv.activated`."""
        activation = None if after is None else (after.alpha, after.inverse)
        weight, bias = self.conv.weight, self.conv.bias
        return codec_conv(x, weight, bias, rate=self.rate, activation=activation)


class _Snake(nn.Module):
    """x + sin²(αx) / (β + 1e-9), with α and β of every channel, stored as logarithms (Ziyin et al.,
    arXiv 2006.08195; Lee et al., arXiv 2206.04658)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(width))
        self.inverse = nn.Parameter(torch.empty(width))  # 1 / (β + 1e-9)


class _ConvNeXt(nn.Module):
    """Liu et al., arXiv 2201.03545, section 2."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dwconv = _Conv(size, size, groups=size)
        self.norm = nn.LayerNorm(size, 1e-6)
        self.pwconv1 = nn.Linear(size, 4 * size)
        self.pwconv2 = nn.Linear(4 * size, size)
        self.gamma = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.dwconv(x).transpose(1, 2))
        h = F.gelu(apply(self.pwconv1, h))
        h = apply(self.pwconv2, h)
        return torch.addcmul(x, h.transpose(1, 2), self.gamma[:, None])


class _Block(nn.Module):
    """Half as many channels, `rate` times as many steps, without the last `rate`."""

    def __init__(self, width: int, rate: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            _Snake(width),
            _Upsample(width, width // 2, rate, 2 * rate),
            *(_Residual(width // 2, dilation) for dilation in _DILATIONS),
        )

    def forward(self, x: Tensor, after: _Snake) -> tuple[Tensor, Tensor]:
        """From its first activation's result to its own, and what `after` makes of that."""
        _, up, *units = self.block
        x, active = up(x, units[0].act1)
        for unit, act in zip(units, [*(unit.act1 for unit in units[1:]), after], strict=True):
            _, active = unit.conv1.activated(active, unit.act2)
            x, active = unit.conv2.activated(active, act, x)
        return x, active


class _Residual(nn.Module):
    """x + conv2(act2(conv1(act1(x))))."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.act1 = _Snake(width)
        self.conv1 = _Conv(width, width, dilation=dilation)
        self.act2 = _Snake(width)
        self.conv2 = _Conv(width, width, taps=1)
