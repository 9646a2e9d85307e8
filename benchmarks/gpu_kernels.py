"""The kernels at the sizes of the models: what is run, beside what in torch, and the least bytes
and FLOPs that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from gpu_measure import Clock, norm_error
from torch import Tensor

from mstar.engine.kernels import matvec, tuning
from mstar.engine.kernels.ada_norm import ada_norm, ada_norm_torch
from mstar.engine.kernels.codec_conv import codec_conv, codec_conv_torch
from mstar.engine.kernels.gated import gated_torch, silu_mul
from mstar.engine.kernels.guided_euler import COLUMNS, guided_euler, guided_euler_torch
from mstar.engine.kernels.l1_cost import l1_cost, l1_cost_torch
from mstar.engine.kernels.layer_norm import layer_norm, layer_norm_torch
from mstar.engine.kernels.paged_attention import paged_attention
from mstar.engine.kernels.paged_batch import FEW, PagedBatch
from mstar.engine.kernels.paged_decode import paged_decode_few_triton, paged_decode_triton
from mstar.engine.kernels.paged_extend import paged_extend_triton
from mstar.engine.kernels.paged_shared import with_shared
from mstar.engine.kernels.paged_tiles import DECODE, DECODE_FEW, EXTEND, tiles
from mstar.engine.kernels.pair_rotary import pair_rotary, pair_rotary_torch
from mstar.engine.kernels.quantize_rows import quantize_rows
from mstar.engine.kernels.resize import Normal, resize
from mstar.engine.kernels.rms_norm import rms_norm, rms_norm_torch
from mstar.engine.kernels.rotary_store import HeadNorms, rotary_store, rotary_store_torch
from mstar.engine.kernels.route import route, route_torch
from mstar.engine.kernels.sample import sample_batch, sample_torch
from mstar.engine.kernels.sample_rows import SampleRows
from mstar.engine.kernels.snake import (
    depthwise_snake,
    depthwise_snake_torch,
    snake,
    snake_torch,
)
from mstar.engine.kernels.tuning import Choice
from mstar.engine.layers.moe import experts_grouped, run_experts
from mstar.engine.layers.quantized import Quantized, quantized_linear
from mstar.engine.sampling import SamplerState, SamplingParams

__all__ = ["rows"]

PAGE = 16
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Args:
        moved: the fewest bytes, each input read once and each output written once.
        flops: of its products.
        eager: the torch equivalent.
        waits: whether that waits for the device, and cannot be captured.
        tiles: kernel, shape and choices of tiles to try first, and how to run with one.
    """

    name: str
    ours: Callable[[], object]
    eager: Callable[[], object]
    moved: float
    flops: float = 0.0
    waits: bool = False
    tiles: tuple[str, str, Sequence[Choice], Callable[[Choice], object]] | None = None


class Cases:
    """What makes cases; `tiny` ones only try the code."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.randn = partial(torch.randn, device=device)

    def of(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def groups(self) -> dict[str, Callable[[], Iterator[Case]]]:
        """Cases are made group by group, so that their memory can go."""
        names = (
            *("decode", "extend", "norms", "rotary", "gated", "experts", "guided", "codec"),
            *("vision", "planner", "sampling", "quantized"),
        )
        return {name: getattr(self, f"_{name}") for name in names}

    def _attention(
        self, n: int, kv_len: int, count: int, heads: int, kv_heads: int, forks: bool = False
    ) -> Case:
        """`count` sequences of `kv_len` keys whose last `n` are new, pages in no order; `forks`:
        they have all pages but the last in common."""
        dim, pages = self.of(128, 16), -(-kv_len // PAGE)
        few = 1 < n <= FEW
        pool = self.randn(2, pages * count, PAGE, kv_heads, dim, dtype=BF16)
        q = self.randn(n * count, heads, dim, dtype=BF16)
        order = torch.randperm(pages * count).view(count, pages)
        if forks:
            order[:, :-1] = order[0, :-1].clone()
        batch = PagedBatch([n] * count, [kv_len] * count, order.tolist(), [n > 1] * count, PAGE)
        k, v = (
            x[order.to(self.device)].flatten(1, 2)[:, :kv_len].transpose(1, 2).contiguous()
            for x in pool
        )
        queries = q.view(count, n, heads, dim).transpose(1, 2).contiguous()
        seen = torch.ones(n, kv_len, dtype=torch.bool, device=self.device).tril(kv_len - n)
        how = {"attn_mask": seen} if few else {"is_causal": n > 1}

        def library() -> Tensor:
            out = F.scaled_dot_product_attention(queries, k, v, enable_gqa=True, **how)
            return out.transpose(1, 2)

        kernel, run = DECODE, paged_decode_triton
        if n > 1:
            kernel, run = (
                (DECODE_FEW, paged_decode_few_triton) if few else (EXTEND, paged_extend_triton)
            )

        laid = batch
        if self.device.type == "cuda":  # once per step, for all layers
            laid = with_shared(batch.tensors_on(self.device), q, pool[0])

        def tiled(tile: Choice) -> Tensor:
            return run(q, *pool, laid, dim**-0.5, tile=tile)

        pairs = n * (kv_len - (n - 1) / 2)
        keys = kv_len + (count - 1) * PAGE if forks else count * kv_len
        kind = f"extend attention, {n} x {kv_len}, causal"
        if n == 1 or few:
            kind = f"decode attention, {count} {'forks' if forks else ''} x {kv_len}"
            kind = kind.replace("  ", " ") + (f", {n} new" if few else "")
        return Case(
            f"{kind}, {heads}/{kv_heads} heads",
            lambda: paged_attention(q, *pool, laid, dim**-0.5),
            library,
            moved=4.0 * dim * (keys * kv_heads + count * n * heads),
            flops=4.0 * count * heads * dim * pairs,
            tiles=(kernel, *tiles(kernel, q, pool[0]), tiled),
        )

    def _decode(self) -> Iterator[Case]:
        context = self.of(8192, 100)
        for count in (1, 8, 64):
            yield self._attention(1, context, self.of(count, 2), 24, 8)
        yield self._attention(1, context, self.of(8, 2), 24, 8, forks=True)
        yield self._attention(4, self.of(8192, 600), self.of(8, 2), 24, 8)

    def _extend(self) -> Iterator[Case]:
        n = self.of(4096, 40)
        yield self._attention(n, n, 1, 32, 8)

    def _norms(self) -> Iterator[Case]:
        for tokens, width in ((8192, 3072), (64, 3072)):
            tokens, width = self.of(tokens, 7), self.of(width, 48)
            x, more = self.randn(2, tokens, width, dtype=BF16)
            weight, bias = self.randn(2, width, dtype=BF16)
            for name, function, plain, params in (
                ("rms_norm", rms_norm, rms_norm_torch, (weight,)),
                ("layer_norm", layer_norm, layer_norm_torch, (weight, bias)),
            ):
                yield Case(
                    f"{name} + residual, {tokens} x {width}",
                    partial(function, x, *params, 1e-6, more),
                    partial(plain, x, *params, 1e-6, more),
                    moved=8.0 * tokens * width,
                )
        x, added = self.randn(2, self.of(16, 2), self.of(256, 3), self.of(1024, 32), dtype=BF16)
        scale, shift, gate = self.randn(3, len(x), 1, x.shape[-1])
        yield Case(
            f"ada_norm + gated addition, {tuple(x.shape)}",
            partial(ada_norm, x, scale, shift, 1e-6, added, gate),
            partial(ada_norm_torch, x, scale, shift, 1e-6, added, gate),
            moved=8.0 * x.numel(),
        )

    def _rotary(self) -> Iterator[Case]:
        tokens, heads, kv_heads, dim = self.of(8192, 20), 32, 4, self.of(128, 16)
        qkv = self.randn(tokens, (heads + 2 * kv_heads) * dim, dtype=BF16)
        cos, sin = self.randn(2, tokens, dim // 2)
        k, v = torch.zeros(2, tokens // PAGE + 1, PAGE, kv_heads, dim, dtype=BF16).to(self.device)
        slots = torch.randperm(tokens).to(self.device)
        norms = HeadNorms(*self.randn(2, dim, dtype=BF16), 1e-6)
        given = (qkv, cos, sin, k, v, slots, heads, kv_heads, norms)
        yield Case(
            f"QK-norm + rotary + cache write, {tokens} tokens, {heads}/{kv_heads} heads",
            partial(rotary_store, *given),
            partial(rotary_store_torch, *given),
            moved=4.0 * qkv.numel() + 8.0 * cos.numel(),
        )
        heads = self.randn(1, self.of(8192, 20), 2, self.of(22, 2), self.of(64, 12), dtype=BF16)
        own, other = self.randn(2, heads.shape[1], heads.shape[-1] // 6 * 6)
        yield Case(
            f"3-D rotary of pairs, {tuple(heads.shape)}",
            partial(pair_rotary, heads, own, other),
            partial(pair_rotary_torch, heads, own, other),
            moved=4.0 * heads.numel() + 8.0 * own.numel(),
        )

    def _gated(self) -> Iterator[Case]:
        for tokens in (4096, 8):
            x = self.randn(self.of(tokens, 3), 2 * self.of(8192, 40), dtype=BF16)
            yield Case(
                f"silu_mul, {len(x)} x 2 x {x.shape[1] // 2}",
                partial(silu_mul, x),
                partial(gated_torch, x, "silu"),
                moved=3.0 * x.numel(),
            )

    def _experts(self) -> Iterator[Case]:
        count, top_k = self.of(128, 8), self.of(8, 2)
        hidden, inner = self.of(2048, 24), self.of(768, 16)
        gate_up = self.randn(count, 2 * inner, hidden, dtype=BF16).mul_(hidden**-0.5)
        down = self.randn(count, hidden, inner, dtype=BF16).mul_(inner**-0.5)
        for tokens in (1, 8, 64, 512, 4096):
            x = self.randn(self.of(tokens, min(tokens, 20)), hidden, dtype=BF16)
            weights, experts = route(self.randn(len(x), count), top_k)
            logits = self.randn(len(x), count, dtype=BF16)
            yield Case(
                f"router, {len(x)} tokens, {top_k} of {count}",
                partial(_weights, route, logits, top_k),
                partial(_weights, route_torch, logits, top_k),
                moved=2.0 * logits.numel() + 12.0 * experts.numel(),
            )
            used = len(experts.unique())
            given = (x, weights, experts, gate_up, down)
            yield Case(
                f"experts, {len(x)} tokens, {top_k} of {count} ({used} used), {hidden} x {inner}",
                partial(run_experts, *given),
                partial(experts_grouped, *given),
                moved=2.0 * (3 * used * hidden * inner + 2 * x.numel()),
                flops=6.0 * experts.numel() * hidden * inner,
                waits=True,
            )

    def _quantized(self) -> Iterator[Case]:
        """Beside the library's product with what the weight stands for, in bfloat16."""
        inputs, outputs = self.of(3072, 48), self.of(8192, 32)
        plain = self.randn(outputs, inputs, dtype=BF16)
        for kind in ("int8", "fp8"):
            weight = Quantized.empty(plain.shape, kind, self.device)
            weight.fill(0, plain)
            same = (weight.values.float() * weight.scales[:, None]).to(BF16)
            for count in (1, 8, 64, 4096):
                values, scales = quantize_rows(self.randn(self.of(count, min(count, 70)), inputs))
                x = (values.float() * scales[:, None]).to(BF16)  # rounded already
                yield Case(
                    f"{kind} product, {len(x)} x {inputs} to {outputs}",
                    partial(quantized_linear, x, weight),
                    partial(F.linear, x, same),
                    moved=1.0 * plain.numel() + 2.0 * len(x) * (inputs + outputs),
                    flops=2.0 * len(x) * plain.numel() / (2 if kind == "fp8" else 1),
                )

    def _guided(self) -> Iterator[Case]:
        requests, tokens, dim = self.of(4, 2), self.of(4096, 30), 64
        x = self.randn(requests, tokens, dim)
        velocities = self.randn(3 * requests, tokens, dim, dtype=BF16)
        places = torch.arange(3 * requests, dtype=torch.int32, device=self.device)
        table = torch.rand(requests, len(COLUMNS), device=self.device).round()
        given = (x, velocities, places.view(3, requests), table)
        yield Case(
            f"guidance + renorm + Euler, {requests} x {tokens} x {dim}",
            partial(guided_euler, *given),
            partial(guided_euler_torch, *given),
            moved=8.0 * x.numel() + 2.0 * velocities.numel(),
        )

    def _codec(self) -> Iterator[Case]:
        steps, channels = self.of(49152, 50), self.of(96, 12)
        x = self.randn(8, steps, channels)
        alpha, inverse = self.randn(2, channels).abs().add_(0.1)
        for dim, turned in ((-1, x), (1, x.mT.contiguous())):
            yield Case(
                f"snake, 8 x {steps} x {channels}, channels {'first' if dim == 1 else 'last'}",
                partial(snake, turned, alpha, inverse, dim),
                partial(snake_torch, turned, alpha, inverse, dim),
                moved=8.0 * x.numel(),
            )
        del x, turned
        for width, long in ((768, 1024), (96, 49152)):
            width, long = self.of(width, 9), self.of(long, 30)
            x, weight = self.randn(8, width, long), self.randn(width, width, 7)
            bias, alpha, inverse = self.randn(3, width).abs().add_(0.1)
            given = (x, weight, bias)
            more = {"dilation": 3, "residual": x, "activation": (alpha, inverse)}
            yield Case(
                f"convolution + residual + snake, 8 x {width} x {long}",
                partial(codec_conv, *given, **more),
                partial(codec_conv_torch, *given, **more),
                moved=16.0 * x.numel(),
                flops=6 * 14.0 * x.numel() * width,  # three products, at half the rate of bf16
            )
        x = self.randn(8, steps, channels)
        alpha, inverse = self.randn(2, channels).abs().add_(0.1)
        taps, bias = self.randn(channels, 7), self.randn(channels)
        yield Case(
            f"depthwise convolution + snake, 8 x {steps} x {channels}",
            partial(depthwise_snake, x, taps, bias, 9, alpha, inverse),
            partial(depthwise_snake_torch, x, taps, bias, 9, alpha, inverse),
            moved=8.0 * x.numel(),
        )

    def _vision(self) -> Iterator[Case]:
        normal = Normal((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), BF16)  # small numbers would differ more
        mean, std = (
            torch.tensor(v, device=self.device).view(3, 1, 1) for v in (normal.mean, normal.std)
        )
        for count, height, width, size, kind in (
            (self.of(64, 2), self.of(256, 8), self.of(256, 8), self.of(256, 8), "bilinear"),
            (self.of(64, 1), self.of(720, 12), self.of(1280, 20), self.of(256, 5), "bilinear"),
            (1, self.of(3000, 12), self.of(4000, 16), self.of(980, 5), "bicubic"),
        ):
            shape = count, height, width, 3
            frames = torch.randint(256, shape, dtype=torch.uint8, device=self.device)
            target = size, width * size // height
            yield Case(
                f"{kind} resize and normalise, {shape} to {target}",
                partial(resize, frames, target, kind, "pillow", normal),
                partial(self._interpolated, frames, target, kind, mean, std),
                moved=frames.numel() + 6.0 * count * target[0] * target[1],
            )

    def _interpolated(
        self, frames: Tensor, size: tuple[int, int], kind: str, mean: Tensor, std: Tensor
    ) -> Tensor:
        """As torch does it on a GPU: in float, without the bytes between rows and columns."""
        x = frames.movedim(-1, -3).float()
        x = F.interpolate(x, size, mode=kind, antialias=True).clamp_(0, 255)
        return x.div_(255).sub_(mean).div_(std).to(BF16)

    def _planner(self) -> Iterator[Case]:
        samples, tokens, width = self.of(800, 3), self.of(256, 6), self.of(1408, 20)
        predicted = self.randn(samples, tokens, width, dtype=BF16)
        goal = self.randn(tokens, width)
        yield Case(
            f"L1 cost with layer norm, {samples} x {tokens} x {width}",
            partial(l1_cost, predicted, goal, 1e-5),
            partial(l1_cost_torch, predicted, goal, 1e-5),
            moved=2.0 * predicted.numel(),
        )

    def _sampling(self) -> Iterator[Case]:
        """A step of sampling; torch sorts the vocabulary where top-k or top-p cut it."""
        vocab = self.of(156_940, 300)
        for count, options in (
            *((count, {"temperature": 0.6, "top_p": 0.95}) for count in (1, 16, 64)),
            (64, {"top_p": 0.95}),  # of such flat rows thousands of tokens are kept
            (64, {"top_k": 50, "top_p": 0.8}),
            (64, {"min_p": 0.05}),
            (64, {}),
            (64, {"temperature": 0.0}),
        ):
            logits = self.randn(self.of(count, 2), vocab) * 2
            states = [SamplerState(SamplingParams(**options, seed=i), vocab) for i in range(count)]
            rows = SampleRows(states[: len(logits)], vocab, self.device)
            said = ", ".join(f"{name} {value}" for name, value in options.items())
            yield Case(
                f"sampling, {len(logits)} x {vocab}, {said or 'temperature 1'}",
                partial(sample_batch, logits, rows),
                partial(sample_torch, logits, rows),
                moved=4.0 * logits.numel(),
            )


def _weights(function: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, top_k: int) -> Tensor:
    """The router's weights, without the experts: of equal scores either may be chosen."""
    return function(logits, top_k)[0]


# Outputs x inputs of the products of a decoding step.
MATVECS = {
    "orpheus qkv": (5120, 3072),
    "orpheus out": (3072, 3072),
    "orpheus gate, up": (16384, 3072),
    "orpheus down": (3072, 8192),
    "orpheus head": (156940, 3072),
    "thinker qkv": (5120, 2048),
    "thinker out": (2048, 4096),
    "thinker head": (152064, 2048),
    "bagel gate, up": (37888, 3584),
    "bagel down": (3584, 18944),
}


def rows(
    clock: Clock, ceilings: dict[str, float], *, tiny: bool = False, tune: bool = False
) -> Iterator[dict]:
    """A row for every kernel and size; one that fails has `error` instead of times.

    Args:
        tune: keep the tiles that are fastest, and of matrix-vector products those that beat the
            library's.
    """
    with torch.inference_mode():
        for name, group in Cases(clock.device, tiny).groups().items():
            torch.manual_seed(0)
            try:
                for case in group():
                    if tune and clock.on_gpu and case.tiles is not None:
                        _tune(clock, *case.tiles)
                    yield _row(clock, ceilings, case)
            except Exception as error:
                yield {"name": name, "error": _said(error)}
        yield from _matvecs(clock, ceilings, tiny, tune)


def _tune(
    clock: Clock,
    kernel: str,
    shape: str,
    choices: Sequence[Choice],
    run: Callable[[Choice], object],
) -> None:
    """Keep the fastest tile; of several sizes of one shape the last one decides."""
    found = tuning.fastest(choices, run, clock.seconds)
    if found is not None:
        tuning.table_of(clock.device).set(kernel, shape, found)


def _row(clock: Clock, ceilings: dict[str, float], case: Case) -> dict:
    try:
        off = norm_error(case.ours(), case.eager())
        ours = clock.seconds(case.ours)
        eager = clock.seconds(case.eager, capture=not case.waits)
    except Exception as error:
        return {"name": case.name, "error": _said(error)}
    return _figures(case.name, ours, eager, case.moved, case.flops, ceilings) | {"differs_by": off}


def _figures(
    name: str, ours: float, eager: float, moved: float, flops: float, ceilings: dict[str, float]
) -> dict:
    by_bytes, by_flops = moved / ceilings["bytes_per_s"], flops / ceilings["flops_per_s"]
    return {
        "name": name,
        "us": 1e6 * ours,
        "torch_us": 1e6 * eager,
        "ratio": eager / ours,
        "of_ceiling": max(by_bytes, by_flops) / ours,
        "ceiling": "bytes" if by_bytes >= by_flops else "flops",
    }


def _matvecs(clock: Clock, ceilings: dict[str, float], tiny: bool, tune: bool) -> Iterator[dict]:
    for name, (outputs, inputs) in MATVECS.items():
        if tiny:
            outputs, inputs = 24, 40
        weight = torch.randn(outputs, inputs, dtype=BF16, device=clock.device)
        for count in (1, 2, 4, 8):
            label = f"matrix-vector, {name}, {count} x {inputs} to {outputs}"
            try:
                yield _matvec(clock, ceilings, label, count, weight, tune)
            except Exception as error:
                yield {"name": label, "error": _said(error)}
        if tiny:
            return


def _matvec(
    clock: Clock, ceilings: dict[str, float], label: str, count: int, weight: Tensor, tune: bool
) -> dict:
    x = torch.randn(count, weight.shape[1], dtype=BF16, device=clock.device)
    library = partial(F.linear, x, weight)
    eager = clock.seconds(library)
    choice = None
    if clock.on_gpu:
        times = [
            (clock.seconds(partial(matvec.matvec_triton, x, weight, None, tile)), i)
            for i, tile in enumerate(matvec.matvec_choices(count))
        ]
        ours, best = min(times)
        choice = matvec.matvec_choices(count)[best]
        off = norm_error(matvec.matvec_triton(x, weight, None, choice), library())
        if tune:
            # A win within the noise is none; an empty choice says that the library is better.
            kept = choice if ours < 0.97 * eager and off < 1e-2 else {}
            shape = matvec.matvec_shape(count, weight)
            tuning.table_of(clock.device).set(matvec.MATVEC, shape, kept)
    else:
        ours, off = clock.seconds(library), 0.0
    moved = 2.0 * (weight.numel() + x.numel() + count * len(weight))
    figures = _figures(label, ours, eager, moved, 2.0 * count * weight.numel(), ceilings)
    return {**figures, "differs_by": off, "tile": choice}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
