"""Which path a tensor takes, and that the kernels import where Triton is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mstar import Engine, InvalidRequest
from mstar.engine.kernels.dispatch import next_power_of_2, use_triton
from mstar.models import loading

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton -> ImportError
from importlib import import_module
from pkgutil import iter_modules
import torch
from mstar.engine import kernels
for module in iter_modules(kernels.__path__):
    import_module(f"mstar.engine.kernels.{module.name}")
from mstar.engine.kernels import dispatch, gated, rms_norm
assert dispatch.triton is None
assert gated.silu_mul(torch.ones(1, 4)).shape == (1, 2)
assert rms_norm.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6).shape == (1, 4)
"""


def test_a_cpu_tensor_never_takes_the_triton_path() -> None:
    assert not use_triton(torch.zeros(1))


@pytest.mark.gpu
def test_a_cuda_tensor_takes_the_triton_path_where_triton_is_installed() -> None:
    pytest.importorskip("triton")
    assert use_triton(torch.zeros(1, device="cuda"))


def test_every_kernel_imports_and_runs_on_cpu_without_triton() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


@pytest.mark.parametrize(("counted", "said"), [(0, "0 GPUs are to be seen"), (1, "Triton")])
def test_a_gpu_that_cannot_be_used_is_refused_with_the_reason(
    counted: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counted)
    monkeypatch.setattr(loading, "triton", None)
    with pytest.raises(InvalidRequest, match=f"device.*cuda:0.*{said}"):
        Engine("pi05-tiny", device="cuda:0")


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (1000, 1024)])
def test_next_power_of_2(n: int, power: int) -> None:
    assert next_power_of_2(n) == power
