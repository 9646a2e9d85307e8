from __future__ import annotations

import numpy as np
import pytest
import torch

from mstar.engine.kernels import staging
from mstar.engine.kernels.staging import block_table, pack, to_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_values_arrive_as_torch_would_make_them(dtype):
    for values in ([], [3], [1, 2, 3, 4, 5], np.arange(6)):
        expected = torch.tensor(values, dtype=dtype)
        assert torch.equal(to_device(values, dtype, CPU), expected)
        assert to_device(values, dtype, CPU).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
def test_parts_of_a_pack_are_the_lists_and_start_at_aligned_addresses(dtype):
    parts = [[1], [], [2, 3, 4, 5, 6], (True, False), np.array([7, 8, 9], np.int32)]
    found = pack(parts, dtype, CPU)
    assert [part.tolist() for part in found] == [list(part) for part in parts]
    assert len({part.untyped_storage().data_ptr() for part in found}) == 1
    assert all(part.storage_offset() * part.itemsize % 16 == 0 for part in found)


def test_a_block_table_is_as_wide_as_its_longest_row():
    assert block_table([[1, 2, 3], [4], []]).tolist() == [
        [1, 2, 3],
        [4, 0, 0],
        [0, 0, 0],
    ]
    assert block_table([[], []]).tolist() == [[0], [0]]
    assert block_table([]).shape == (0, 1)


def test_a_gpu_is_sent_pinned_memory_without_waiting(monkeypatch):
    log = []

    class Host:
        def pin_memory(self):
            log.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            log.append((device.type, non_blocking))
            return self

    monkeypatch.setattr(staging.torch, "from_numpy", lambda array: Host())
    to_device([1, 2], torch.int64, torch.device("cuda"))
    assert log == ["pinned", ("cuda", True)]
