"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def triton_device() -> str:
    """Where a Triton kernel can run: a GPU, else the CPU through Triton's interpreter."""
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds NaN, or the largest integer: a kernel that leaves some of its
    output unwritten does not pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # with which torch fills it
    yield
    torch.use_deterministic_algorithms(False)
