"""What tile sizes are remembered."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

from mstar.engine.kernels import tuning
from mstar.engine.kernels.tuning import Table, best, fastest

CHOICES = [{"BLOCK": 1}, {"BLOCK": 2}, {"BLOCK": 3}]
TIMES = {1: 3.0, 2: 1.0, 3: 2.0}
CUDA = torch.device("cuda", 0)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """The table of a GPU that tunes; calls take what `TIMES` says."""
    table = Table(tmp_path / "shipped.json", tmp_path / "own" / "gpu.json")
    monkeypatch.setattr(tuning, "_table", lambda index: table)
    monkeypatch.setattr(tuning, "_milliseconds", lambda call: TIMES[call()])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return table


def test_an_unknown_shape_is_measured_once_and_kept_on_disk(table: Table, tmp_path: Path) -> None:
    tried = []

    def run(choice: dict[str, int]) -> int:
        tried.append(choice)
        return choice["BLOCK"]

    for _ in range(2):
        assert best("k", "4x4", CHOICES, run, CUDA) == {"BLOCK": 2}
    assert tried == CHOICES
    again = Table(tmp_path / "shipped.json", tmp_path / "own" / "gpu.json")
    assert again.get("k", "4x4") == {"BLOCK": 2}
    assert again.get("k", "8x8") is None


def test_without_a_gpu_and_during_a_capture_nothing_is_measured(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert best("k", "4x4", CHOICES, pytest.fail, torch.device("cpu")) == CHOICES[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best("k", "4x4", CHOICES, pytest.fail, CUDA) == CHOICES[0]
    assert table.get("k", "4x4") is None


def test_a_choice_that_is_no_longer_offered_is_measured_again(table: Table) -> None:
    table.set("k", "4x4", {"BLOCK": 64})
    assert best("k", "4x4", CHOICES, lambda choice: choice["BLOCK"], CUDA) == {"BLOCK": 2}


def test_choices_that_do_not_run_are_passed_over() -> None:
    def run(choice: dict[str, int]) -> int:
        if choice["BLOCK"] == 2:
            raise RuntimeError("out of resources: shared memory")
        return choice["BLOCK"]

    assert fastest(CHOICES, run, lambda call: TIMES[call()]) == {"BLOCK": 3}
    assert fastest(CHOICES[1:2], run, lambda call: TIMES[call()]) is None


def test_files_of_others_are_kept_and_broken_ones_ignored(tmp_path: Path) -> None:
    shipped, own = tmp_path / "shipped.json", tmp_path / "own.json"
    shipped.write_text(json.dumps({"k 1": {"BLOCK": 1}, "k 2": {"BLOCK": 1}}))
    own.write_text("[1, 2")
    table = Table(shipped, own)
    assert table.get("k", "1") == {"BLOCK": 1}
    own.write_text(json.dumps({"k 3": {"BLOCK": 3}}))  # another process
    table.set("k", "2", {"BLOCK": 2})
    assert json.loads(own.read_text()) == {"k 2": {"BLOCK": 2}, "k 3": {"BLOCK": 3}}
    assert table.get("k", "2") == {"BLOCK": 2}


def test_a_folder_that_cannot_be_written_costs_only_the_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = Table(tmp_path / "none.json", tmp_path / "file" / "own.json")
    table.set("k", "1", {"BLOCK": 1})
    assert table.get("k", "1") == {"BLOCK": 1}


@pytest.mark.parametrize("kept", ["home", "cache", "nowhere"])
def test_a_table_is_kept_where_the_user_keeps_such_things(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's user may have no home, and no entry in the list of users."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA X{index} (80 GB)")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if kept == "cache":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if kept == "nowhere":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    tuning._table.__wrapped__(1).set("k", "1", {"BLOCK": 1})
    (file,) = (tmp_path / kept).rglob("*.json")
    assert file.name.startswith("nvidia-x1-80-gb-triton-")
    assert file.parent.name == "tuned"
