"""The published streaming rule (28-token window, stride 7) through our frames and codec."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mstar.engine.weights import Checkpoint, load
from mstar.models import orpheus
from mstar.models.orpheus.frames import FrameBuffer, by_level, to_pcm16
from mstar.models.orpheus.snac import SnacConfig, SnacDecoder

TINY = Path(orpheus.__file__).parent / "tiny" / "snac"
DATA = Path(__file__).parents[2] / "data" / "orpheus"
GOLDEN = load_file(DATA / "goldens.safetensors")
JSON = json.loads((DATA / "goldens.json").read_text())


@pytest.fixture(scope="module")
def codec() -> SnacDecoder:
    with torch.device("meta"):
        snac = SnacDecoder(SnacConfig.from_file(TINY / "config.json"))
    return load(snac, Checkpoint.open(TINY), device="cpu", dtype=torch.float32)


def frames_of(case: int) -> tuple[FrameBuffer, list[int]]:
    """The frames of a golden token sequence, and after how many tokens each was complete."""
    frames, complete = FrameBuffer(), []
    for count, token in enumerate(GOLDEN[f"c{case}.greedy"].tolist(), start=1):
        if frames.push(token):
            complete.append(count)
    return frames, complete


def levels(frames: FrameBuffer, lo: int, hi: int) -> tuple[torch.Tensor, ...]:
    return by_level(torch.tensor([frames.codes(lo, hi)]))


@pytest.mark.parametrize("case", range(6))
def test_golden_tokens_become_the_golden_codes(case):
    frames, _ = frames_of(case)
    assert frames.count == JSON["cases"][case]["frames"]
    for level, codes in enumerate(levels(frames, 0, frames.count)):
        assert torch.equal(codes[0].int(), GOLDEN[f"c{case}.codes{level}"])


def test_the_published_example_of_de_interleaving():
    example = JSON["deinterleave_example"]
    frames = FrameBuffer()
    assert [frames.push(token) for token in example["tokens"]] == [False] * 6 + [True]
    assert [c[0].tolist() for c in levels(frames, 0, 1)] == [example[f"codes{i}"] for i in range(3)]


@pytest.mark.parametrize("case", [0, 2])
def test_the_second_frame_of_each_window_is_the_golden_chunk(codec, case):
    frames, complete = frames_of(case)
    chunks = GOLDEN[f"c{case}.stream_chunks"]
    assert complete[3:] == GOLDEN[f"c{case}.stream_after_n_tokens"].tolist()
    assert len(chunks) == frames.count - 3
    for first, chunk in enumerate(chunks):
        codes = levels(frames, first, first + 4)
        torch.testing.assert_close(codec(codes, keep=(1, 2))[0], chunk, rtol=0, atol=5e-6)


def test_the_first_and_the_last_window_are_the_golden_ones(codec):
    frames, _ = frames_of(0)
    for name, first in (("first", 0), ("last", frames.count - 4)):
        codes = levels(frames, first, first + 4)
        golden = GOLDEN[f"c0.stream_{name}_window_full"]
        torch.testing.assert_close(codec(codes)[0], golden, rtol=0, atol=5e-6)


def test_samples_are_truncated_to_int16(codec):
    golden = GOLDEN["c0.stream_chunk0_i16"].numpy()
    assert np.array_equal(to_pcm16(GOLDEN["c0.stream_chunks"][0].numpy()), golden)
