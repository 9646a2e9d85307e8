"""Batches for the attention tests, and the float64 reference they are held against."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mstar.engine.kernels.paged_batch import PagedBatch


@dataclass
class Case:
    """One mixed batch: (query_len, kv_len, causal) per sequence, and the shape of the heads."""

    name: str
    sequences: list[tuple[int, int, bool]]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 4
    consecutive: bool = False
    shared: dict[int, int] = field(default_factory=dict)  # sequence -> the one whose pages it reads


CASES = [
    Case("mixed", [(5, 5, True), (1, 9, True), (3, 12, True), (2, 7, False), (0, 4, True)]),
    Case(
        "mixed-views", [(5, 5, True), (1, 9, True), (3, 12, True), (0, 3, True)], consecutive=True
    ),
    Case("decode", [(1, 1, True), (1, 4, True), (1, 33, True), (1, 70, False)]),
    Case("decode-views", [(1, 17, True), (1, 3, True)], consecutive=True, page_size=16),
    Case("decode-skip", [(1, 6, True), (0, 5, True), (1, 8, True)]),
    Case("no-gqa", [(1, 11, True), (4, 6, True)], heads=2),
    Case("one-kv-head", [(1, 11, True), (7, 7, True)], heads=3, kv_heads=1, head_dim=8),
    Case("group-of-3", [(19, 40, True), (1, 21, True)], heads=6, head_dim=32, page_size=16),
    Case("decode-group-of-3", [(1, 40, True), (1, 21, True)], heads=6, head_dim=32, page_size=1),
    Case("odd-dim", [(6, 13, True), (4, 4, False)], head_dim=20),
    Case("wide", [(35, 47, False), (32, 32, False), (1, 9, True)], heads=6),
    Case("wide-views", [(33, 50, False)], head_dim=20, consecutive=True),
    Case("blocks", [(70, 150, True), (9, 130, False), (65, 65, True)], heads=3, kv_heads=1),
    Case("odd-blocks", [(5, 200, True), (1, 150, True)], head_dim=20, page_size=16),
    Case("few", [(2, 520, True), (8, 517, True), (3, 512, False), (9, 513, True), (5, 511, True)]),
    Case("shared", [(1, 9, True), (1, 9, True), (3, 9, True)], shared={1: 0, 2: 0}),
]


def make_case(
    case: Case, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, PagedBatch, float]:
    """Random q ``[T, heads, dim]``, pools ``[pages, size, kv_heads, dim]``, the batch, the scale.

    Unused slots hold NaN, so that reading one shows.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [-(-kv // case.page_size) for _, kv, _ in case.sequences]
    total = sum(sizes) + 2
    order = list(range(1, total))
    if not case.consecutive:
        order = [1 + i for i in torch.randperm(total - 1, generator=generator).tolist()]
    tables, taken = [], 0
    for index, size in enumerate(sizes):
        if index in case.shared:
            tables.append(tables[case.shared[index]])
        else:
            tables.append(order[taken : taken + size])
            taken += size
    query_lens, kv_lens, causal = (list(column) for column in zip(*case.sequences, strict=True))
    batch = PagedBatch(query_lens, kv_lens, tables, causal, case.page_size)

    pools = []
    for _ in range(2):
        pool = torch.full((total, case.page_size, case.kv_heads, case.head_dim), torch.nan)
        for table, kv_len in zip(tables, kv_lens, strict=True):
            for position in range(kv_len):
                row = torch.randn(case.kv_heads, case.head_dim, generator=generator)
                pool[table[position // case.page_size], position % case.page_size] = row
        pools.append(pool.to(device, dtype))
    q = torch.randn(sum(query_lens), case.heads, case.head_dim, generator=generator)
    return q.to(device, dtype), *pools, batch, case.head_dim**-0.5


def reference(q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: PagedBatch, scale: float):
    """Attention written out query by query and head by head in float64, on CPU."""
    q, k_pages, v_pages = (x.double().cpu() for x in (q, k_pages, v_pages))
    group = q.shape[1] // k_pages.shape[2]
    out = torch.empty_like(q)
    row = 0
    for n, kv_len, table, causal in zip(
        batch.query_lens, batch.kv_lens, batch.tables, batch.causal, strict=True
    ):
        k, v = (pages[list(table)].flatten(0, 1)[:kv_len] for pages in (k_pages, v_pages))
        for i in range(n):
            seen = kv_len - n + i + 1 if causal else kv_len
            for head in range(q.shape[1]):
                keys, values = k[:seen, head // group], v[:seen, head // group]
                weights = torch.softmax(keys @ q[row, head] * scale, dim=0)
                out[row, head] = weights @ values
            row += 1
    return out
