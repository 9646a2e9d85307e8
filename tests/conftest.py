"""Shared by all tests. Without a CUDA device Triton kernels run in Triton's interpreter.

Tiny networks run on one thread, unless OMP_NUM_THREADS says otherwise: on a busy machine, threads
that wait for each other take most of the time. Both switches are read when a library is first
imported, so they are set here, before any test file.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip themselves where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
