"""The benchmark for GPUs, as far as it can be tried without one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.fixture
def report(gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A report of programs in a folder of ours."""
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    (tmp_path / "good.py").write_text("print('[1, 2]')")
    (tmp_path / "bad.py").write_text(
        "print('{\"a\": 1}')\nprint('{\"b\": 2}')\nraise OSError('no')"
    )
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)")
    args = argparse.Namespace(
        device="cpu", tiny=True, json=True, kernels=False, models=True, tune=0, out=None
    )
    return gpu.Report(args)


def test_without_a_gpu_it_says_so_and_exits_with_2(gpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json"])
    assert gpu.main() == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_every_kernel_is_run_and_agrees_with_torch(gpu) -> None:
    pytest.importorskip("triton")
    from gpu_kernels import rows
    from gpu_measure import Clock, ceilings

    clock = Clock(torch.device("cpu"))
    found = list(rows(clock, ceilings(clock, tiny=True), tiny=True))
    assert not [row for row in found if "error" in row]
    assert len(found) > 20
    assert all(row["us"] > 0 and row["differs_by"] < 2e-2 for row in found)
    assert all(gpu.line_of(row) for row in found)


def test_gaps_are_told_apart_by_their_length(gpu) -> None:
    from gpu_measure import idle, idle_during

    busy = [(0, 10), (5, 20), (22, 30), (130, 140)]  # two at a time; gaps of 2 and of 100
    found = idle(busy, longest=50)
    assert found == {"gpu_idle": 102 / 140, "gpu_waits": 100 / 140}
    edges = [(-1000 + i, -999 + i) for i in range(3)]
    assert idle([*edges, *((i, i + 1) for i in range(30)), (5000, 5001)]) == {
        "gpu_idle": 0.0,
        "gpu_waits": 0.0,
    }
    assert idle([]) == {}
    assert idle_during(lambda: torch.ones(3) + 1) == {}  # no GPU, or nothing on it
    assert "TypeError" in idle_during(lambda: torch.ones(3) + "1")["gpu_idle"]


def test_the_figures_of_a_model_come_as_they_are_found(gpu) -> None:
    import gpu_models

    found = {}
    for figures in gpu_models.bagel("cpu", tiny=True):
        assert json.dumps(figures)
        found |= figures
    assert set(found) >= {"ready_s", "text_step_ms_1", "image_s", "edit_s", "throughput_of_4"}


def test_what_there_is_is_kept_part_by_part(gpu, report, monkeypatch, tmp_path: Path) -> None:
    report.args.out = tmp_path / "kept" / "found.json"
    monkeypatch.setattr(gpu, "MODELS", {"first": ("", "good.py"), "second": ("", "look.py")})
    (tmp_path / "look.py").write_text(f"print(open({str(report.args.out)!r}).read())")
    seen = report.make()["models"]["second"]
    assert seen["models"] == {"first": [1, 2]}


def test_what_fails_is_told_and_its_figures_so_far_are_kept(report) -> None:
    assert report.part("good", ["good.py"], 60) == [1, 2]
    assert report.part("bad", ["bad.py"], 60) == [{"a": 1}, {"b": 2}]
    assert report.part("slow", ["slow.py"], 0.2) == []
    assert report.failed == {"bad": "OSError: no", "slow": "took longer than 0 s"}


def test_the_rest_goes_on_when_a_model_fails(gpu, report, monkeypatch) -> None:
    commands = {"first": ("", "bad.py"), "gone": ("", "gone.py"), "last": ("", "good.py")}
    monkeypatch.setattr(gpu, "MODELS", commands)
    made = report.make()
    assert made["models"] == {"first": [{"a": 1}, {"b": 2}], "gone": [], "last": [1, 2]}
    assert set(made["failed"]) == {"ceilings", "first", "gone"}
    assert json.dumps(made)
