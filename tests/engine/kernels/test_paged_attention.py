"""Paged attention, torch and Triton, against a float64 reference that loops over queries."""

from __future__ import annotations

from itertools import zip_longest

import pytest
import torch
from attention_cases import CASES, Case, make_case, reference

from mstar.engine.kernels import paged_attention as module
from mstar.engine.kernels import paged_decode, paged_tiles
from mstar.engine.kernels.paged_attention import paged_attention, paged_attention_triton
from mstar.engine.kernels.paged_batch import BatchTensors, PagedBatch
from mstar.engine.kernels.paged_decode import paged_decode_few_triton, paged_decode_triton
from mstar.engine.kernels.paged_extend import paged_extend_triton
from mstar.engine.kernels.paged_tiles import DECODE, DECODE_FEW, EXTEND, tiles

LONG = Case("long", [(1, 100, True), (1, 7, True), (1, 33, True), (1, 64, True)], page_size=16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for each of them."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(paged_decode, "_MOST", 8)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    q, k, v, batch, scale = make_case(case, dtype)
    out = paged_attention(q, k, v, batch, scale)
    assert out.dtype == dtype
    assert out.shape == q.shape
    expected = reference(q, k, v, batch, scale)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_full_attention_does_not_depend_on_how_many_rows_are_computed_at_a_time(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in CASES if case.name == "wide")
    q, k, v, batch, scale = make_case(case, torch.float32)
    monkeypatch.setattr(module, "_SCORES", rows * 47)
    out = paged_attention(q, k, v, batch, scale)
    torch.testing.assert_close(out.double(), reference(q, k, v, batch, scale), atol=2e-6, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_sequence_alone_gives_the_same_as_in_the_batch(case: Case) -> None:
    """To the bit, but for decode steps of short sequences, which are computed together."""
    q, k, v, batch, scale = make_case(case, torch.float32)
    together = paged_attention(q, k, v, batch, scale).split(batch.query_lens)
    for index, part in enumerate(q.split(batch.query_lens)):
        alone = PagedBatch(
            [batch.query_lens[index]],
            [batch.kv_lens[index]],
            [batch.tables[index]],
            [batch.causal[index]],
            batch.page_size,
        )
        bound = 1e-6 if batch.all_decode else 0.0
        out = paged_attention(part, k, v, alone, scale)
        torch.testing.assert_close(out, together[index], atol=bound, rtol=bound)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_short_sequences_together_give_what_they_give_one_by_one(case: Case, monkeypatch) -> None:
    q, k, v, batch, scale = make_case(case, torch.float32)
    together = paged_attention(q, k, v, batch, scale)
    monkeypatch.setattr("mstar.engine.kernels.paged_attention._SHORT", 0)
    one_by_one = paged_attention(q, k, v, batch, scale)
    torch.testing.assert_close(together, one_by_one, atol=1e-6, rtol=1e-6)


def test_reads_a_pool_whose_layers_are_interleaved_and_queries_inside_a_wider_row() -> None:
    q, k, v, batch, scale = make_case(CASES[0], torch.float32)
    pool = torch.stack([k, v], dim=1)  # pages are 2 * page_size rows apart
    wide = torch.cat([torch.zeros_like(q), q], dim=1)
    out = paged_attention(wide[:, q.shape[1] :], pool[:, 0], pool[:, 1], batch, scale)
    assert torch.equal(out, paged_attention(q, k, v, batch, scale))


def test_a_batch_serves_several_layers() -> None:
    q, k, v, batch, scale = make_case(CASES[0], torch.float32)
    first = paged_attention(q, k, v, batch, scale)
    paged_attention(q, v, k, batch, scale)
    assert torch.equal(paged_attention(q, k, v, batch, scale), first)


def test_slots_name_the_place_of_every_new_token() -> None:
    batch = PagedBatch([2, 0, 1, 3], [5, 4, 1, 7], [[7, 2], [1], [3], [4, 5]], [True] * 4, 4)
    assert batch.slots.tolist() == [7 * 4 + 3, 2 * 4, 12, 20, 21, 22]
    assert batch.slots.dtype == torch.int64
    assert batch.num_tokens == 6


def test_an_empty_batch_gives_an_empty_result() -> None:
    batch = PagedBatch([0], [3], [[0]], [True], 4)
    pages = torch.zeros(1, 4, 1, 8)
    assert paged_attention(torch.zeros(0, 2, 8), pages, pages, batch, 1.0).shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [1, 2], [[0]], [True], 4), "one entry per sequence"),
        (([3], [2], [[0]], [True], 4), "query_len 3"),
        (([1], [9], [[0, 1]], [True], 4), "needs 3 pages"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedBatch(*arguments)


def test_a_pool_with_another_page_size_is_refused() -> None:
    batch = PagedBatch([1], [1], [[0]], [True], 8)
    pages = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match="pages of 4 slots"):
        paged_attention(torch.zeros(1, 1, 8), pages, pages, batch, 1.0)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES]
    + [(case, torch.float16) for case in (CASES[0], CASES[2], CASES[7])],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_the_kernels_match_the_reference(
    case: Case, dtype: torch.dtype, triton_device: str
) -> None:
    # bfloat16 is for the GPU tests below: the interpreter multiplies its bits as integers.
    q, k, v, batch, scale = make_case(case, dtype, triton_device)
    tensors = batch.tensors_on(q.device)
    out = paged_attention_triton(q, k, v, tensors, scale)
    assert out.dtype == dtype
    expected = reference(q, k, v, batch, scale)
    torch.testing.assert_close(out.double().cpu(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=lambda case: case.name)
def test_every_tile_gives_the_same(case: Case, triton_device: str) -> None:
    q, k, v, batch, scale = make_case(case, torch.float32, triton_device)
    expected = reference(q, k, v, batch, scale)
    choices = [tiles(kernel, q, k)[1] for kernel in (EXTEND, DECODE, DECODE_FEW)]
    for extend, decode, few in zip_longest(*choices):
        out = torch.full_like(q, torch.nan)
        paged_extend_triton(q, k, v, batch.tensors_on(q.device), scale, out, extend)
        paged_decode_triton(q, k, v, batch.tensors_on(q.device), scale, out, tile=decode)
        paged_decode_few_triton(q, k, v, batch.tensors_on(q.device), scale, out, tile=few)
        torch.testing.assert_close(out.double().cpu(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("pages", [3, 40])
def test_tiles_are_measured_over_the_pool_which_is_only_read(
    pages: int, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def best(kernel: str, shape: str, choices, run, device):
        tried.extend((kernel, run(choice).isfinite().all()) for choice in choices)
        return choices[-1]

    monkeypatch.setattr(paged_tiles, "best", best)
    monkeypatch.setattr(paged_tiles, "_MEASURED", {DECODE: (3, 1, 20), EXTEND: (1, 17, 17)})
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2, pages, 4, 2, 16, generator=generator).to(triton_device)
    before = pool.clone()
    q = torch.randn(4, 4, 16, generator=generator).to(triton_device)
    batch = PagedBatch([3, 1], [3, 5], [[2], [0, 1]], [True, True], 4)
    out = paged_attention_triton(q, *pool, batch.tensors_on(q.device), 1.0)
    torch.testing.assert_close(
        out.double().cpu(), reference(q, *pool, batch, 1.0), atol=2e-6, rtol=0
    )
    assert [kernel for kernel, _ in tried] == [EXTEND] * 3 + [DECODE] * 3
    assert all(finite for _, finite in tried)
    assert torch.equal(pool, before)


def test_the_kernels_read_strided_pools_and_queries(triton_device: str) -> None:
    q, k, v, batch, scale = make_case(CASES[0], torch.float32, triton_device)
    pool = torch.stack([k, v], dim=1)
    wide = torch.cat([torch.zeros_like(q), q], dim=1)
    tensors = batch.tensors_on(q.device)
    out = paged_attention_triton(wide[:, q.shape[1] :], pool[:, 0], pool[:, 1], tensors, scale)
    assert torch.equal(out, paged_attention_triton(q, k, v, tensors, scale))


def test_decode_split_over_the_sequence_matches_the_reference(triton_device: str) -> None:
    q, k, v, batch, scale = make_case(LONG, torch.float32, triton_device)
    out = paged_decode_triton(q, k, v, batch.tensors_on(q.device), scale, min_chunk=32)
    torch.testing.assert_close(
        out.double().cpu(), reference(q, k, v, batch, scale), atol=2e-6, rtol=0
    )


def test_no_width_of_a_table_needs_a_kernel_of_its_own(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel is compiled for must be the same in every step: nothing is compiled late."""
    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *given, **constants: launched.append((grid[1:], constants))

    for name in ("_decode_kernel", "_combine_kernel"):
        monkeypatch.setattr(paged_decode, name, Kernel())
    for width in (1, 3, 64, 1000):
        batch = PagedBatch([1], [16 * width], [range(width)], [True], 16)
        q, pages = torch.zeros(1, 4, 16), torch.zeros(1, 16, 2, 16)
        paged_decode_triton(q, pages, pages, batch.tensors_on(q.device), 1.0)
    assert launched == launched[:2] * 4


def test_a_sequence_decodes_to_the_same_bits_whatever_else_is_in_the_batch(
    triton_device: str,
) -> None:
    q, k, v, batch, scale = make_case(LONG, torch.float32, triton_device)
    together = paged_decode_triton(q, k, v, batch.tensors_on(q.device), scale, min_chunk=32)
    for index, kv_len in enumerate(batch.kv_lens):
        alone = PagedBatch([1], [kv_len], [batch.tables[index]], [True], batch.page_size)
        row = q[index : index + 1]
        out = paged_decode_triton(row, k, v, alone.tensors_on(q.device), scale, min_chunk=32)
        assert torch.equal(out[0], together[index])


def test_padding_rows_of_a_captured_batch_do_not_disturb_the_others(triton_device: str) -> None:
    q, k, v, batch, scale = make_case(LONG, torch.float32, triton_device)
    k[0] = v[0] = 0  # what a padding row reads
    tensors = batch.tensors_on(q.device)
    padded = BatchTensors(
        query_start=torch.arange(6, dtype=torch.int32, device=q.device),
        kv_len=torch.nn.functional.pad(tensors.kv_len, (0, 1), value=1),
        block_table=torch.nn.functional.pad(tensors.block_table, (0, 9, 0, 1)),
        causal=torch.nn.functional.pad(tensors.causal, (0, 1), value=1),
        max_query_len=1,
        page_size=batch.page_size,
    )
    wide = torch.cat([q, q[:1]])
    out = paged_attention_triton(wide, k, v, padded, scale)
    assert torch.equal(out[:4], paged_attention_triton(q, k, v, tensors, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_batches_on_a_gpu_match_the_torch_path(dtype: torch.dtype) -> None:
    sequences = [
        (1, 1500, True),
        (300, 300, True),
        (128, 900, True),
        (77, 400, False),
        (5, 1300, True),
        (1, 20, True),
    ]
    case = Case("large", sequences, heads=24, kv_heads=8, head_dim=128, page_size=16)
    q, k, v, batch, scale = make_case(case, dtype, "cuda")
    out = paged_attention(q, k, v, batch, scale)
    wide = [x.cpu().float() for x in (q, k, v)]
    expected = paged_attention(*wide, batch, scale)
    torch.testing.assert_close(
        out.float().cpu(), expected, atol=2e-5 if dtype == torch.float32 else 2e-2, rtol=0
    )


@pytest.mark.gpu
def test_a_captured_decode_step_serves_other_lengths() -> None:
    q, k, v, batch, scale = make_case(LONG, torch.bfloat16, "cuda")
    tensors = batch.tensors_on(q.device)
    paged_attention(q, k, v, tensors, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(q, k, v, tensors, scale)
    tensors.kv_len.copy_(torch.tensor([90, 3, 33, 20], dtype=torch.int32))
    graph.replay()
    assert torch.equal(out, paged_attention(q, k, v, tensors, scale))
