"""Captured steps of the flow, with a recorder that runs the step instead of a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from asking import DATA, levels, request_of

from mstar import Engine
from mstar.engine import paged_context
from mstar.engine.captured import CapturedSteps
from mstar.engine.kernels.paged_attention import paged_attention
from mstar.engine.kernels.paged_batch import FEW, PagedBatch
from tests.recording import replays

CASES = json.loads((DATA / "goldens.json").read_text())["cases"]
NAMES = ["t2i_global", "edit_text_channel", "interleave", "t2i_taylorseer"]


def attention_of_tensors(q, keys, values, batch, scale):
    """The CPU's kernels want lists."""
    if not isinstance(batch, PagedBatch):
        lengths = batch.query_start.diff().tolist()
        assert max(lengths) == batch.max_query_len
        assert batch.has_decode == (1 in lengths)
        few = [index for index, n in enumerate(lengths) if 1 < n <= FEW]
        rows = [[index, 2 * place] for place, index in enumerate(few)]
        assert batch.few is None or batch.few.rows.tolist() == rows
        assert batch.few is None or batch.few.tokens == 2 * len(few)
        tables, causal = batch.block_table.tolist(), batch.causal.tolist()
        batch = PagedBatch(lengths, batch.kv_len.tolist(), tables, causal, batch.page_size)
    return paged_attention(q, keys, values, batch, scale)


@pytest.fixture(scope="module")
def engine():
    with Engine("bagel-tiny") as engine:
        yield engine


@pytest.fixture
def captured(engine, monkeypatch):
    monkeypatch.setattr(paged_context, "paged_attention", attention_of_tensors)
    steps = CapturedSteps(replays, torch.device("cpu"))
    monkeypatch.setattr(engine.model.flow.stepper, "captured", steps)
    return steps


def test_captured_steps_draw_the_images_of_plain_ones(engine, captured, monkeypatch):
    asked = [request_of(CASES[name]) for name in NAMES]
    with monkeypatch.context() as plain:
        plain.setattr(engine.model.flow.stepper, "captured", None)
        expected = [engine.generate(**each).images for each in asked]
    assert not len(captured)
    assert [engine.generate(**each).images for each in asked] == expected
    # Guided and unguided steps of three requests, two of them of one size; guesses stay plain.
    assert 3 <= len(captured) <= 6
    before = len(captured)
    assert [engine.generate(**each).images for each in asked] == expected
    assert len(captured) == before


def test_captured_steps_serve_several_at_a_time(engine, captured):
    asked = {"text": "A boat", "width": 64, "height": 32, "output_modalities": ("image",)}
    several = engine.generate(**asked, num_timesteps=9, num_images=3, seed=1).images
    alone = engine.generate(**asked, num_timesteps=9, seed=1).images
    assert abs(levels(several[0]).astype(int) - levels(alone[0])).max() <= 1
    assert len(captured) == 4  # of three images and of one, guided and not


def test_the_usual_sizes_are_captured_before_the_first_request(engine, captured):
    engine.warmup()
    before = len(captured)
    assert before
    for count in (1, 2):
        engine.generate(text="x", num_images=count, num_timesteps=9, output_modalities=("image",))
    assert len(captured) == before
