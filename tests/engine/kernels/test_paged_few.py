"""Decode attention of sequences with a few new tokens each."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, make_case, reference

from mstar.engine.kernels import paged_attention as module
from mstar.engine.kernels import paged_decode, paged_tiles
from mstar.engine.kernels.paged_attention import paged_attention_triton
from mstar.engine.kernels.paged_batch import FEW, FEW_KEYS, Few, PagedBatch
from mstar.engine.kernels.paged_decode import paged_decode_few_triton
from mstar.engine.kernels.paged_extend import paged_extend_triton
from mstar.engine.kernels.paged_tiles import DECODE_FEW, get_ready, takes_few

SEQUENCES = [(FEW, FEW_KEYS + 1, True), (1, 600, True), (2, 580, False), (9, 530, True)]


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for each of them."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(paged_decode, "_MOST", 8)


def expect_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out.double().cpu(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 20), (3, 1, 16), (16, 2, 16)])
def test_a_few_new_tokens_see_what_they_may_see(
    heads: int, kv_heads: int, dim: int, triton_device: str
) -> None:
    """In chunks of 64 keys the first of 8 tokens sees nothing of the last chunk."""
    case = Case("few", SEQUENCES, heads, kv_heads, dim, page_size=16)
    q, k, v, batch, scale = make_case(case, torch.float32, triton_device)
    expected = reference(q, k, v, batch, scale)
    out = torch.full_like(q, torch.nan)
    tensors = batch.tensors_on(q.device)
    paged_decode_few_triton(q, k, v, tensors, scale, out, min_chunk=64)
    rows = torch.tensor([True] * 8 + [False] + [True] * 2 + [False] * 9)
    expect_close(out[rows], expected[rows])
    assert out[~rows].isnan().all()
    paged_extend_triton(q, k, v, tensors, scale, out)
    assert out[8].isnan().all()
    expect_close(paged_attention_triton(q, k, v, tensors, scale), expected)


def test_a_sequence_is_decoded_if_it_has_few_new_tokens_and_many_keys() -> None:
    lens = [(2, FEW_KEYS), (2, FEW_KEYS - 1), (1, 900), (FEW, 900), (FEW + 1, 900), (0, 900)]
    tables = [range(60)] * len(lens)
    batch = PagedBatch(*zip(*lens, strict=True), tables, [True] * len(lens), 16)
    few = batch.tensors_on(torch.device("cpu")).few
    assert few.rows.tolist() == [[0, 0], [3, 2]]
    assert few.tokens == 2 + FEW
    none = PagedBatch([2], [5], [[0]], [True], 16)
    assert none.tensors_on(torch.device("cpu")).few is None


def test_what_is_named_and_turns_out_to_have_few_keys_is_extended(triton_device: str) -> None:
    """As in a captured step, which knows the new tokens of a sequence and not its keys."""
    case = Case("named", [(2, 30, True), (2, 515, True)], page_size=16)
    q, k, v, batch, scale = make_case(case, torch.float32, triton_device)
    rows = torch.tensor([[0, 0], [1, 2]], dtype=torch.int32, device=q.device)
    tensors = batch.tensors_on(q.device)._replace(few=Few(rows, 4))
    expect_close(paged_attention_triton(q, k, v, tensors, scale), reference(q, k, v, batch, scale))


def test_heads_that_do_not_fit_into_one_product_are_extended(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "paged_decode_few_triton", lambda *given: given[3].few and 1 / 0)
    case = Case("wide", [(2, 515, True)], heads=9, kv_heads=1, page_size=16)
    q, k, v, batch, scale = make_case(case, torch.float32, triton_device)
    assert not takes_few(q, k)
    out = paged_attention_triton(q, k, v, batch.tensors_on(q.device), scale)
    expect_close(out, reference(q, k, v, batch, scale))


def test_the_kernel_is_launched_once_before_it_is_needed(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_tiles, "_ready", set())
    monkeypatch.setattr(paged_tiles, "_MEASURED", {DECODE_FEW: (1, FEW, 600)})
    pages = torch.randn(40, 16, 2, 16, device=triton_device)
    launched = []

    def launch(*given: object) -> None:
        launched.append(paged_decode_few_triton(*given).isfinite().all())

    for _ in range(2):
        get_ready(DECODE_FEW, torch.randn(5, 4, 16, device=triton_device), pages, pages, launch)
    assert launched == [True]
