"""CPU paths of the kernels against the plain torch formulation, in one process.

    python benchmarks/kernels_cpu.py [--threads 2]

Prints microseconds per call (best of several repeats) and how many times faster ours is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.gated import silu_mul
from mstar.engine.kernels.paged_attention import paged_attention
from mstar.engine.kernels.paged_batch import PagedBatch
from mstar.engine.kernels.rms_norm import rms_norm
from mstar.engine.kernels.rotary_store import rotary_store

PAGE = 16


def microseconds(function: Callable[[], object], budget: float = 0.15) -> float:
    """Best mean time of a call over five repeats that together take about ``budget`` seconds."""
    start = time.perf_counter()
    function()
    count = max(1, int(budget / 5 / max(time.perf_counter() - start, 1e-6)))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            function()
        best = min(best, (time.perf_counter() - start) / count)
    return best * 1e6


def report(
    name: str, ours: Callable[[], Tensor], naive: Callable[[], Tensor], per: int = 1
) -> None:
    """Check that both agree and print one line; ``per`` (sequences) divides the times."""
    torch.testing.assert_close(ours(), naive(), atol=1e-5, rtol=1e-5)
    fast, slow = microseconds(ours) / per, microseconds(naive) / per
    print(f"{name:48s} {fast:9.1f} us  naive {slow:9.1f} us  {slow / fast:5.2f}x")


def naive_attention(q: Tensor, k: Tensor, v: Tensor, batch: PagedBatch, scale: float) -> Tensor:
    """Gather, expand the kv heads, mask, softmax: the formula, sequence by sequence."""
    group = q.shape[1] // k.shape[2]
    outputs = []
    for rows, kv_len, table in zip(
        q.split(batch.query_lens), batch.kv_lens, batch.tables, strict=True
    ):
        index = torch.tensor(table)
        keys, values = (
            pages[index].flatten(0, 1)[:kv_len].repeat_interleave(group, 1).transpose(0, 1)
            for pages in (k, v)
        )
        scores = rows.transpose(0, 1) @ keys.transpose(1, 2) * scale
        n = len(rows)
        hidden = torch.ones(n, kv_len, dtype=torch.bool).triu(kv_len - n + 1)
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
        outputs.append((weights @ values).transpose(0, 1))
    return torch.cat(outputs)


def attention(heads: tuple[int, int, int], n: int, kv_len: int, count: int, scatter: bool) -> None:
    """``count`` equal sequences with ``n`` new tokens each."""
    num_heads, kv_heads, dim = heads
    pages = -(-kv_len // PAGE)
    pool = torch.randn(2, pages * count, PAGE, kv_heads, dim)
    order = torch.randperm(pages * count).tolist() if scatter else list(range(pages * count))
    tables = [order[i * pages : (i + 1) * pages] for i in range(count)]
    batch = PagedBatch([n] * count, [kv_len] * count, tables, [True] * count, PAGE)
    q = torch.randn(n * count, num_heads, dim)
    arguments = (q, *pool, batch, dim**-0.5)
    where = "scattered" if scatter else "in a row"
    report(
        f"attention {heads} n={n} kv={kv_len} B={count} {where}",
        lambda: paged_attention(*arguments),
        lambda: naive_attention(*arguments),
        per=count,
    )


def norm(rows: int, hidden: int) -> None:
    x, weight = torch.randn(rows, hidden), torch.randn(hidden)
    report(
        f"rms_norm [{rows}, {hidden}]",
        lambda: rms_norm(x, weight, 1e-5),
        lambda: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight,
    )


def gate(rows: int, width: int) -> None:
    x = torch.randn(rows, 2 * width)
    report(
        f"silu_mul [{rows}, 2 x {width}]",
        lambda: silu_mul(x),
        lambda: F.silu(x[:, :width]) * x[:, width:],
    )


def rotary(heads: tuple[int, int, int], tokens: int) -> None:
    num_heads, kv_heads, dim = heads
    qkv = torch.randn(tokens, (num_heads + 2 * kv_heads) * dim)
    cos, sin = torch.randn(tokens, dim // 2), torch.randn(tokens, dim // 2)
    k_pages, v_pages = torch.zeros(2, tokens // PAGE + 1, PAGE, kv_heads, dim)
    slots = torch.arange(tokens)

    def naive() -> Tensor:
        q, k, v = qkv.view(tokens, -1, dim).split([num_heads, kv_heads, kv_heads], 1)
        c, s = torch.cat([cos, cos], -1)[:, None], torch.cat([sin, sin], -1)[:, None]

        def rotate(x: Tensor) -> Tensor:
            x1, x2 = x.chunk(2, -1)
            return x * c + torch.cat([-x2, x1], -1) * s

        k_pages.view(-1, kv_heads, dim)[slots] = rotate(k)
        v_pages.view(-1, kv_heads, dim)[slots] = v
        return rotate(q)

    report(
        f"rotary_store {heads} T={tokens}",
        lambda: rotary_store(qkv, cos, sin, k_pages, v_pages, slots, num_heads, kv_heads),
        naive,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"float32, {threads} threads, heads = (query, kv, dim); attention: time per sequence")
    tiny, llama = (4, 2, 16), (24, 8, 128)
    with torch.inference_mode():
        for heads, kv_len in ((tiny, 300), (llama, 1000)):
            for count in (1, 8, 32):
                attention(heads, 1, kv_len, count, scatter=False)
            attention(heads, 1, kv_len, 8, scatter=True)
            attention(heads, kv_len, kv_len, 1, scatter=False)
            attention(heads, 64, kv_len, 1, scatter=False)
        for rows, hidden in ((1, 64), (8, 64), (1, 3072), (256, 3072)):
            norm(rows, hidden)
        for rows, width in ((1, 128), (8, 128), (1, 8192), (64, 8192)):
            gate(rows, width)
        for heads in (tiny, llama):
            for tokens in (1, 8, 256):
                rotary(heads, tokens)


if __name__ == "__main__":
    main()
