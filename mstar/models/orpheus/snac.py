"""The decoder half of SNAC, a multi-scale neural audio codec (Siuzdak et al., arXiv 2410.14411).

Codes at several rates -> embeddings summed at the finest rate -> a non-causal stack of transposed
and dilated convolutions -> waveform. Always float32: lower precision is audible.

Everything between the codes and the waveform is kept as `[batch, time, channels]`, so that a 1x1
convolution and a transposed convolution are matrix products over contiguous rows, and all weights
are stored the way these products want them, with weight norm folded (`sources` says how to get
them from a published checkpoint). The encoder is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.kernels.dispatch import use_triton
from mstar.engine.kernels.snake import depthwise_snake, snake
from mstar.engine.weights import Source
from mstar.models.orpheus.snac_config import DILATIONS, REACH, TAPS, SnacConfig
from mstar.models.orpheus.snac_weights import as_stored, folded

__all__ = ["SnacConfig", "SnacDecoder"]

_AT_ONCE = 1 << 20  # elements of the largest activation: on the CPU more at once is slower


class SnacDecoder(nn.Module):
    """Codes -> waveform."""

    def __init__(self, config: SnacConfig) -> None:
        super().__init__()
        self.config = config
        levels, first = len(config.vq_strides), 2 if config.depthwise else 1
        self.codebooks = nn.ModuleList(
            Codebook(f"quantizer.quantizers.{i}", config.codebook_size, config.codebook_dim)
            for i in range(levels)
        )
        outs = [f"quantizer.quantizers.{i}.out_proj" for i in range(levels)]
        self.project = Projection(outs, levels * config.codebook_dim, config.latent_dim)
        if config.depthwise:
            self.stem = nn.Sequential(
                Depthwise("decoder.model.0", config.latent_dim),
                Pointwise("decoder.model.1", config.latent_dim, config.decoder_dim),
            )
        else:
            self.stem = Dense("decoder.model.0", config.latent_dim, config.decoder_dim)
        self.blocks = nn.ModuleList(
            Block(f"decoder.model.{first + i}", config, i) for i in range(len(config.decoder_rates))
        )
        last, width = first + len(self.blocks), config.width(len(self.blocks))
        self.snake = Snake(f"decoder.model.{last}", width)
        self.out = Dense(f"decoder.model.{last + 1}", width, 1)

    def sources(self, name: str) -> Sequence[Source]:
        """Where a parameter comes from in a published checkpoint."""
        path, leaf = name.rsplit(".", 1)
        return self.get_submodule(path).sources(leaf)

    def noise_lengths(self, frames: int) -> list[int]:
        """Time steps of the noise of each block for `frames` frames; empty without noise."""
        return self.config.noise_lengths(frames)

    @torch.no_grad()
    def forward(
        self,
        codes: Sequence[Tensor],
        noise: Sequence[Tensor] | None = None,
        *,
        keep: tuple[int, int] | None = None,
    ) -> Tensor:
        """Decode F frames.

        What one item sounds like does not depend, to the bit, on the others, nor on how much more
        than `context_frames` there is around it (measured on CPUs).

        Args:
            codes: a tensor of integers per level, [batch, F * vq_strides[0] / vq_strides[i]].
            noise: standard normal noise for each block, [batch, 1, noise_lengths(F)[i]]; None
                decodes without.
            keep: return only frames keep[0] to keep[1] - 1. The rest then serves as context, and
                is not computed where it cannot be heard: `forward(window, keep=(3, 4))` costs a
                fraction of `forward(window)` and gives the same samples.

        Returns:
            Samples in [-1, 1], float32, [batch, frames kept * frame_samples].

        Raises:
            ValueError: the shapes do not belong together.
        """
        keep = self._check(codes, noise, keep)
        batch, frames = codes[0].shape
        group = batch
        if not codes[0].is_cuda:
            largest = max(
                (last - first) * self.config.width(i)
                for i, (first, last) in enumerate(self.config.spans(frames, *keep))
            )
            group = max(1, _AT_ONCE // largest)
        waves = []
        for i in range(0, batch, group):
            items = slice(i, i + group)
            part = None if noise is None else [n[items] for n in noise]
            *_, wave = self.stages([c[items] for c in codes], part, keep=keep)
            waves.append(wave)
        return torch.cat(waves)

    @torch.no_grad()
    def stages(
        self, codes: Sequence[Tensor], noise: Sequence[Tensor] | None, *, keep: tuple[int, int]
    ) -> Iterator[Tensor]:
        """Every intermediate result: the latents, the stem's, each block's, and the waveform.

        All but the waveform are [batch, time, channels], and cover what `keep` needs.
        """
        config = self.config
        spans = config.spans(len(codes[0][0]), *keep)
        strides = config.vq_strides
        parts = [
            book(code).repeat_interleave(stride, 1)
            for book, code, stride in zip(self.codebooks, codes, strides, strict=True)
        ]
        first, last = spans[0]
        reach = slice(max(0, first - REACH), last + REACH)
        x = self.project(torch.cat(parts, -1)[:, reach])
        yield x
        x = self.stem(x)[:, first - reach.start : last - reach.start]
        yield x
        for i, block in enumerate(self.blocks):
            x = block(x, spans[i], spans[i + 1], None if noise is None else noise[i])
            yield x
        begin = keep[0] * config.frame_samples - spans[-1][0]
        wave = self.out(self.snake(x))[
            :, begin : begin + (keep[1] - keep[0]) * config.frame_samples
        ]
        yield wave.squeeze(-1).tanh()

    def _check(
        self,
        codes: Sequence[Tensor],
        noise: Sequence[Tensor] | None,
        keep: tuple[int, int] | None,
    ) -> tuple[int, int]:
        strides = self.config.vq_strides
        batch, frames = codes[0].shape
        want = [(batch, frames * (strides[0] // stride)) for stride in strides]
        if [tuple(c.shape) for c in codes] != want or not frames:
            raise ValueError(f"codes have shapes {_shapes(codes)}, expected {want}")
        if noise is not None:
            wanted = [(batch, 1, steps) for steps in self.noise_lengths(frames)]
            if [tuple(n.shape) for n in noise] != wanted:
                raise ValueError(f"noise has shapes {_shapes(noise)}, expected {wanted}")
        lo, hi = keep or (0, frames)
        if not 0 <= lo < hi <= frames:
            raise ValueError(f"keep={keep} is not a range of frames within 0 to {frames}")
        return lo, hi


class Block(nn.Module):
    """Snake, upsampling, noise, residual units: `[B, T, C]` -> `[B, T * rate, C / 2]`."""

    def __init__(self, stored: str, config: SnacConfig, index: int) -> None:
        super().__init__()
        wide, narrow = config.width(index), config.width(index + 1)
        self.snake = Snake(f"{stored}.block.0", wide)
        self.up = Upsample(f"{stored}.block.1", wide, narrow, config.decoder_rates[index])
        self.noise = (
            Pointwise(f"{stored}.block.2.linear", narrow, narrow, bias=False)
            if config.noise
            else None
        )
        first = 3 if config.noise else 2
        self.units = nn.ModuleList(
            Residual(f"{stored}.block.{first + i}", narrow, dilation, config.depthwise)
            for i, dilation in enumerate(DILATIONS)
        )

    def forward(
        self, x: Tensor, held: tuple[int, int], wanted: tuple[int, int], noise: Tensor | None
    ) -> Tensor:
        """`x` holds the input's time steps `held`; returns the output's time steps `wanted`.

        Output near the ends of `wanted` lacks context unless it is an end of the signal.
        """
        x = self.up(self.snake(x), held[0], wanted)
        if noise is not None:
            x.addcmul_(self.noise(x), noise[:, 0, wanted[0] : wanted[1], None])
        for unit in self.units:
            x = unit(x)
        return x


class Residual(nn.Module):
    """x + 1x1(snake(conv7(snake(x)))), the 7 taps `dilation` apart; changes x in place."""

    def __init__(self, stored: str, width: int, dilation: int, depthwise: bool) -> None:
        super().__init__()
        self.first = Snake(f"{stored}.block.0", width)
        conv, path = (Depthwise, f"{stored}.block.1")
        self.conv = (
            conv(path, width, dilation) if depthwise else Dense(path, width, width, dilation)
        )
        self.second = Snake(f"{stored}.block.2", width)
        self.mix = Pointwise(f"{stored}.block.3", width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.mix(self._filtered(self.first(x))))

    def _filtered(self, x: Tensor) -> Tensor:
        conv, after = self.conv, self.second
        if isinstance(conv, Depthwise) and use_triton(x):
            return depthwise_snake(
                x, conv.weight, conv.bias, conv.dilation, after.alpha, after.inverse
            )
        return after(conv(x))


class Snake(nn.Module):
    """x + sin²(αx) / (α + 1e-9), with one α per channel (Ziyin et al., arXiv 2006.08195)."""

    def __init__(self, stored: str, width: int) -> None:
        super().__init__()
        self.stored = stored
        self.alpha = nn.Parameter(torch.ones(width))
        self.inverse = nn.Parameter(torch.ones(width))  # 1 / (α + 1e-9)

    def sources(self, leaf: str) -> Sequence[Source]:
        invert = leaf == "inverse"
        return as_stored(
            f"{self.stored}.alpha",
            lambda a: (a + 1e-9).reciprocal().flatten() if invert else a.flatten(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.alpha, self.inverse)


class Codebook(nn.Module):
    """The rows of one level's codebook, used as stored."""

    def __init__(self, stored: str, size: int, dim: int) -> None:
        super().__init__()
        self.stored = stored
        self.weight = nn.Parameter(torch.zeros(size, dim))

    def sources(self, leaf: str) -> Sequence[Source]:
        return as_stored(f"{self.stored}.codebook.weight", lambda w: w)

    def forward(self, code: Tensor) -> Tensor:
        return F.embedding(code, self.weight)


class Projection(nn.Module):
    """The levels' output projections and their sum, as one product over all levels' rows."""

    def __init__(self, stored: Sequence[str], inputs: int, width: int) -> None:
        super().__init__()
        self.stored = stored
        self.weight = nn.Parameter(torch.zeros(width, inputs))
        self.bias = nn.Parameter(torch.zeros(width))

    def sources(self, leaf: str) -> Sequence[Source]:
        if leaf == "bias":
            return (Source(tuple(f"{path}.bias" for path in self.stored), sum),)
        return folded(self.stored, lambda ws: torch.cat(ws, 1).squeeze(2))

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight, self.bias)


class Pointwise(nn.Module):
    """A 1x1 convolution."""

    def __init__(self, stored: str, inputs: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.stored = stored
        self.weight = nn.Parameter(torch.zeros(width, inputs))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def sources(self, leaf: str) -> Sequence[Source]:
        if leaf == "bias":
            return as_stored(f"{self.stored}.bias", lambda b: b)
        return folded([self.stored], lambda ws: ws[0].squeeze(2))

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight, self.bias)


class Depthwise(nn.Module):
    """Seven taps per channel, `dilation` apart, with zeros beyond the ends."""

    def __init__(self, stored: str, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.stored, self.dilation = stored, dilation
        self.weight = nn.Parameter(torch.zeros(width, TAPS))
        self.bias = nn.Parameter(torch.zeros(width))

    def sources(self, leaf: str) -> Sequence[Source]:
        if leaf == "bias":
            return as_stored(f"{self.stored}.bias", lambda b: b)
        return folded([self.stored], lambda ws: ws[0].squeeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """Folded into rows of `dilation` time steps, taps are one row apart: not dilated."""
        batch, steps, width = x.shape
        rows = -(-steps // self.dilation)
        if spare := rows * self.dilation - steps:
            x = F.pad(x, (0, 0, 0, spare))
        image = x.view(batch, rows, self.dilation, width).permute(0, 3, 1, 2)
        kernel = self.weight.view(width, 1, TAPS, 1)
        y = _conv2d(image, kernel, self.bias, (REACH, 0), groups=width)
        return y.permute(0, 2, 3, 1).reshape(batch, -1, width)[:, :steps]


class Dense(nn.Module):
    """Seven taps over all channels, `dilation` apart, with zeros beyond the ends."""

    def __init__(self, stored: str, inputs: int, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.stored, self.dilation = stored, dilation
        self.weight = nn.Parameter(torch.zeros(TAPS * width, inputs))
        self.bias = nn.Parameter(torch.zeros(width))

    def sources(self, leaf: str) -> Sequence[Source]:
        if leaf == "bias":
            return as_stored(f"{self.stored}.bias", lambda b: b)
        return folded([self.stored], lambda ws: ws[0].permute(2, 0, 1).flatten(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """All taps at every step as one product, then their shifted sum."""
        batch, steps, _ = x.shape
        margin = REACH * self.dilation
        taps = matmul(F.pad(x, (0, 0, margin, margin)), self.weight)
        taps = taps.view(batch, -1, TAPS, len(self.bias))
        y = self.bias.expand(batch, steps, -1).clone()
        for k in range(TAPS):
            y += taps[:, k * self.dilation : k * self.dilation + steps, k]
        return y


class Upsample(nn.Module):
    """A transposed convolution with stride r and 2r taps: `r` output steps per input step.

    Input step s reaches output steps r·s - p to r·s - p + 2r - 1, with p = ceil(r / 2): its own
    group of r and the next one. So it is one product and one shifted addition.
    """

    def __init__(self, stored: str, inputs: int, width: int, rate: int) -> None:
        super().__init__()
        self.stored, self.rate = stored, rate
        self.weight = nn.Parameter(torch.zeros(2 * rate * width, inputs))
        self.bias = nn.Parameter(torch.zeros(width))

    def sources(self, leaf: str) -> Sequence[Source]:
        if leaf == "bias":
            return as_stored(f"{self.stored}.bias", lambda b: b)
        return folded([self.stored], lambda ws: ws[0].permute(2, 1, 0).flatten(0, 1))

    def forward(self, x: Tensor, first: int, wanted: tuple[int, int]) -> Tensor:
        """`x` starts at input step `first`; returns the output steps `wanted`."""
        batch, steps, _ = x.shape
        width = len(self.bias)
        own, after = matmul(x, self.weight).view(batch, steps, 2, -1).unbind(2)
        y = x.new_empty(batch, steps + 1, self.rate * width)
        y[:, 0], y[:, -1] = own[:, 0], after[:, -1]
        torch.add(own[:, 1:], after[:, :-1], out=y[:, 1:-1])
        begin = self.rate * first - (self.rate + 1) // 2
        y = y.view(batch, -1, width)[:, wanted[0] - begin : wanted[1] - begin]
        return y + self.bias


def _conv2d(
    image: Tensor, kernel: Tensor, bias: Tensor, padding: tuple[int, int], groups: int
) -> Tensor:
    """`F.conv2d` in float32, whatever the process lets cuDNN do with float32.

    By default that is TF32, with 10 bits of mantissa, which is audible. The operator beneath
    `F.conv2d` takes the permission as an argument, so no setting that others share is touched.
    """
    cudnn = torch.backends.cudnn
    flags = (cudnn.benchmark, cudnn.deterministic, cudnn.enabled)
    return torch.ops.aten._convolution(
        image, kernel, bias, (1, 1), padding, (1, 1), False, (0, 0), groups, *flags, False
    )


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [B, T, in] and [out, in] -> [B, T, out].

    On a GPU this is float32 unless the process has asked torch for less in all its products
    (`torch.set_float32_matmul_precision`).

    On the CPU as a 1x1 convolution of an image in channels-last layout, which oneDNN computes
    about twice as fast as the BLAS that torch ships with. It repacks the filter at each call, so
    the larger operand is taken as the image. (`F.conv2d` would choose another library for small
    images, and so other last bits.)
    """
    if x.is_cuda or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    batch, steps, inputs = x.shape
    swap = batch * steps < len(weight)
    image, kernel = (weight[None], x.reshape(-1, inputs)) if swap else (x, weight)
    image, kernel = image.transpose(1, 2).unsqueeze(2), kernel[:, :, None, None]
    y = torch.mkldnn_convolution(image, kernel, None, (0, 0), (1, 1), (1, 1), 1)
    y = y.view(batch, steps, -1).contiguous() if swap else y.squeeze(2).transpose(1, 2)
    return y if bias is None else y.add_(bias)


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]
