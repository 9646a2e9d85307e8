"""Decode attention of sequences that begin with the same pages."""

from __future__ import annotations

import pytest
import torch
from attention_cases import reference
from torch import Tensor

from mstar.engine import paged_context
from mstar.engine.kernels import paged_decode
from mstar.engine.kernels.paged_attention import paged_attention_triton
from mstar.engine.kernels.paged_batch import BatchTensors, PagedBatch
from mstar.engine.kernels.paged_decode import paged_decode_triton
from mstar.engine.kernels.paged_shared import forks_together, shared_keys
from mstar.engine.kvcache import KVLayout, KVPool
from mstar.engine.layers.attention import Projected

SIZE, CHUNK = 8, 64
# Two forks of a sequence, a stranger, a fork from its middle, and one of a later window.
PREFIX = [*range(30, 40), *range(9, 0, -1)]
TABLES = [
    [*PREFIX, 20],
    [*PREFIX, 21, 22],
    [*range(40, 60)],
    [*PREFIX[:10], 23, 24],
    [*PREFIX, 25],
]
LENGTHS = [155, 163, 160, 93, 154]


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for each of them."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(paged_decode, "_MOST", 8)


def made(
    heads: int, device: str, new: list[int] | None = None
) -> tuple[Tensor, Tensor, PagedBatch]:
    """Queries, pools of keys and values, and the batch; one kv head."""
    generator = torch.Generator().manual_seed(0)
    new = new or [1] * len(TABLES)
    q = torch.randn(sum(new), heads, 64, generator=generator)
    pools = torch.randn(2, 60, SIZE, 1, 64, generator=generator)
    batch = PagedBatch(new, LENGTHS, TABLES, [True] * len(new), SIZE)
    return q.to(device), pools.to(device), batch


def unshared(tensors: BatchTensors) -> BatchTensors:
    return tensors._replace(shared=torch.zeros_like(tensors.kv_len))


def decode(q: Tensor, pools: Tensor, tensors: BatchTensors) -> Tensor:
    return paged_decode_triton(q, *pools, tensors, 0.125, min_chunk=CHUNK)


@pytest.mark.parametrize(("together", "keys"), [(4, [0, 152, 0, 80, 0]), (2, [0, 152, 0, 0, 0])])
def test_neighbours_share_the_whole_pages_that_they_both_begin_with(
    together: int, keys: list[int], triton_device: str
) -> None:
    _, _, batch = made(1, triton_device)
    tensors = batch.tensors_on(torch.device(triton_device))
    assert shared_keys(tensors, together).tolist() == keys


def test_long_tables_are_compared_to_their_end(triton_device: str) -> None:
    table = torch.arange(1, 2501).repeat(2, 1)
    table[1, 2400:] += 5000
    batch = PagedBatch([1, 1], [2500, 2499], table.tolist(), [True] * 2, 1)
    assert shared_keys(batch.tensors_on(torch.device(triton_device)), 2).tolist() == [0, 2400]


def test_equal_pages_beyond_a_sequence_are_not_shared(triton_device: str) -> None:
    """Tables are padded, and of a common last page each may see another part."""
    batch = PagedBatch([1, 1], [20, 12], [[1, 2, 3], [1, 2]], [True] * 2, SIZE)
    assert shared_keys(batch.tensors_on(torch.device(triton_device)), 2).tolist() == [0, 8]


def test_only_decoding_sequences_share(triton_device: str) -> None:
    _, _, batch = made(1, triton_device, [1, 3, 1, 1, 0])
    tensors = batch.tensors_on(torch.device(triton_device))
    assert shared_keys(tensors, 4).tolist() == [0, 0, 0, 80, 0]
    _, _, batch = made(1, triton_device, [2, 1, 1, 1, 1])
    tensors = batch.tensors_on(torch.device(triton_device))
    assert shared_keys(tensors, 4).tolist() == [0] * 5


@pytest.mark.parametrize(("heads", "together"), [(1, 16), (3, 4), (4, 4), (7, 2), (9, 1), (24, 1)])
def test_as_many_share_as_fit_into_the_rows_of_a_product(heads: int, together: int) -> None:
    assert forks_together(torch.empty(5, heads, 8), torch.empty(2, 4, 1, 8)) == together


def expect_equal(out: Tensor, expected: Tensor) -> None:
    """To the bit, but in the interpreter: NumPy may add up later rows in another order."""
    bound = 0.0 if out.is_cuda else 1e-6
    torch.testing.assert_close(out, expected, atol=bound, rtol=0)


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_sharing_changes_no_bit(heads: int, triton_device: str) -> None:
    q, pools, batch = made(heads, triton_device)
    tensors = batch.tensors_on(q.device)
    out = decode(q, pools, tensors)
    expect_equal(out, decode(q, pools, unshared(tensors)))
    expected = reference(q, *pools, batch, 0.125)
    torch.testing.assert_close(out.double().cpu(), expected, atol=2e-6, rtol=0)


def test_chunks_that_are_shared_are_read_once(triton_device: str) -> None:
    """By the first of a window: the others would read garbage here."""
    q, pools, batch = made(3, triton_device)
    tensors = batch.tensors_on(q.device)
    tensors = tensors._replace(shared=shared_keys(tensors, 4))
    expected = decode(q, pools, unshared(tensors))
    pools[:, 0] = torch.nan
    table = tensors.block_table.clone()
    table[1, : 2 * CHUNK // SIZE] = 0
    table[3, : CHUNK // SIZE] = 0
    out = decode(q, pools, tensors._replace(block_table=table))
    expect_equal(out, expected)


def test_sequences_that_are_cut_differently_do_not_share(triton_device: str) -> None:
    """Chunks of 64 and of 128 keys: each sequence is cut as if it were alone."""
    pages = list(range(70))
    batch = PagedBatch([1, 1], [510, 520], [pages, pages], [True] * 2, SIZE)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 64, generator=generator)
    pools = torch.randn(2, 70, SIZE, 1, 64, generator=generator)
    q, pools = q.to(triton_device), pools.to(triton_device)
    tensors = batch.tensors_on(q.device)
    assert shared_keys(tensors, 8).tolist() == [0, 504]
    expect_equal(decode(q, pools, tensors), decode(q, pools, unshared(tensors)))


@pytest.mark.gpu
def test_a_captured_step_looks_again_in_each_replay() -> None:
    q, pools, batch = made(3, "cuda")
    tensors = batch.tensors_on(q.device)
    decode(q, pools, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(q, pools, tensors)
    tensors.block_table[1, :9] = torch.arange(45, 54, dtype=torch.int32, device="cuda")
    graph.replay()
    expect_equal(out, decode(q, pools, unshared(tensors)))


def test_a_mixed_batch_shares_among_those_that_decode(triton_device: str) -> None:
    q, pools, batch = made(3, triton_device, [1, 1, 4, 1, 2])
    out = paged_attention_triton(q, *pools, batch.tensors_on(q.device), 0.125)
    expected = reference(q, *pools, batch, 0.125)
    torch.testing.assert_close(out.double().cpu(), expected, atol=2e-6, rtol=0)


def test_a_step_looks_once_for_all_layers_what_is_shared(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[BatchTensors] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, batch: BatchTensors, scale: float) -> Tensor:
        batches.append(batch)
        return q

    monkeypatch.setattr(paged_context, "use_triton", lambda q: True)
    monkeypatch.setattr(paged_context, "paged_attention", attention)
    pool = KVPool(KVLayout(2, 1, 64), 60 * SIZE, page_size=SIZE, device=triton_device)
    _, _, batch = made(1, triton_device)
    device = torch.device(triton_device)
    context = paged_context.PagedContext(pool, batch, batch.slots_on(device))
    angles = torch.ones(5, 32, device=device), torch.zeros(5, 32, device=device)
    for layer in range(2):
        context.attend(layer, [Projected(torch.randn(5, 3 * 64, device=device))], angles, 1, 1)
    first, second = batches
    assert first.shared is second.shared
    assert first.shared.tolist() == [0, 152, 0, 80, 152]
