"""Tokens -> frames -> codes, and samples -> PCM."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mstar.models.orpheus.frames import (
    CODES,
    FIRST_CODE,
    SLOTS,
    FrameBuffer,
    by_level,
    to_pcm16,
)

DATA = Path(__file__).parents[2] / "data" / "orpheus"
STOP = 128258


def token(slot: int, code: int) -> int:
    return FIRST_CODE + CODES * slot + code


def filled(tokens) -> FrameBuffer:
    buffer = FrameBuffer()
    for t in tokens:
        buffer.push(t)
    return buffer


def levels(buffer: FrameBuffer, lo: int, hi: int):
    return by_level(torch.tensor(buffer.codes(lo, hi), dtype=torch.int64))


def interleave(codes) -> list[int]:
    """The tokens of codes [n], [2n], [4n]."""
    frames = torch.empty(len(codes[0]), 7, dtype=torch.int64)
    for slots, level in zip(SLOTS, codes, strict=True):
        frames[:, slots] = level.view(-1, len(slots))
    return (frames + FIRST_CODE + CODES * torch.arange(7)).flatten().tolist()


@pytest.mark.parametrize("case", range(6))
def test_goldens(case):
    tensors = load_file(DATA / "goldens.safetensors")
    tokens = tensors[f"c{case}.greedy"].tolist()
    buffer = filled(tokens)
    assert tokens[-1] == STOP
    assert buffer.count == len(tokens) // 7
    codes = levels(buffer, 0, buffer.count)
    for level, found in enumerate(codes):
        assert torch.equal(found, tensors[f"c{case}.codes{level}"].flatten().long())
    assert interleave(codes) == tokens[:-1]


def test_push_is_true_when_a_frame_is_complete():
    buffer = FrameBuffer()
    pushed = [buffer.push(token(i % 7, i)) for i in range(14)]
    assert [i for i, done in enumerate(pushed) if done] == [6, 13]
    assert buffer.count == 2


def test_codes_are_in_order_of_time():
    codes = levels(filled([token(i % 7, 10 + i) for i in range(14)]), 0, 2)
    assert [c.tolist() for c in codes] == [
        [10, 17],
        [11, 14, 18, 21],
        [12, 13, 15, 16, 19, 20, 22, 23],
    ]
    assert {c.dtype for c in codes} == {torch.int64}


def test_a_range_of_frames_is_a_slice_of_all():
    buffer = filled([token(i % 7, i) for i in range(70)])
    whole, part = levels(buffer, 0, 10), levels(buffer, 3, 8)
    for level, rate in enumerate((1, 2, 4)):
        assert torch.equal(part[level], whole[level][3 * rate : 8 * rate])
    assert [len(c) for c in levels(buffer, 4, 4)] == [0, 0, 0]


def test_the_ends_of_a_slots_range_are_legal_and_their_neighbours_are_not():
    for slot in range(7):
        good = [token(s, 0) for s in range(slot)]
        for bad in (token(slot, -1), token(slot, CODES), STOP, 0, -1):
            rest = [token(s, CODES - 1) for s in range(slot, 7)]
            buffer = filled([*good, bad, *rest])
            assert buffer.count == 1, (slot, bad)
            assert sorted(buffer.codes(0, 1)) == [0] * slot + [CODES - 1] * (7 - slot)


def test_an_incomplete_frame_is_not_counted():
    buffer = filled([token(i % 7, 1) for i in range(13)])
    assert buffer.count == 1
    with pytest.raises(IndexError, match="frames 0 to 2 of 1"):
        buffer.codes(0, 2)


@given(st.lists(st.integers() | st.integers(FIRST_CODE, FIRST_CODE + 7 * CODES), max_size=60))
def test_any_integers_leave_only_legal_frames(tokens):
    buffer = FrameBuffer()
    done = sum(buffer.push(t) for t in tokens)
    assert done == buffer.count
    codes = buffer.codes(0, done)
    assert len(codes) == 7 * done
    assert all(0 <= code < CODES for code in codes)


def test_a_batch_is_taken_apart_row_by_row():
    rows = torch.arange(2 * 21).view(2, 21)
    both = [by_level(row) for row in rows]
    for level, *alone in zip(by_level(rows), *both, strict=True):
        assert torch.equal(level, torch.stack(alone))


@given(st.lists(st.integers(0, CODES - 1), max_size=28))
def test_interleave_is_the_inverse(values):
    n = len(values) // 7
    whole = torch.tensor(values[: 7 * n], dtype=torch.int64)
    codes = whole[:n], whole[n : 3 * n], whole[3 * n :]
    buffer = filled(interleave(codes))
    assert buffer.count == n
    assert all(torch.equal(a, b) for a, b in zip(levels(buffer, 0, n), codes, strict=True))


def test_pcm_is_clamped_and_cut_towards_zero():
    pcm = to_pcm16(np.float32([[0.0, 1.0, -1.0], [7.0, -7.0, 0.5]]))
    assert pcm.dtype == np.int16
    assert pcm.tolist() == [[0, 32767, -32767], [32767, -32767, 16383]]
    assert to_pcm16(np.float32([0.99 / 32767, -1.99 / 32767])).tolist() == [0, -1]
