"""Bytes of images to normalised pixels, torch and Triton, against float64."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kernels.pixels import normalise_pixels, normalise_pixels_triton

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 3), (30, 20, 3), (0, 4, 4, 3)], ids=str)
@pytest.mark.parametrize("function", [normalise_pixels, normalise_pixels_triton])
def test_pixels_match_float64(function, shape, dtype, triton_device: str) -> None:
    frames = torch.randint(256, shape, dtype=torch.uint8, device=triton_device)
    found = function(frames, MEAN, STD, dtype)
    assert found.dtype == dtype
    assert found.is_contiguous()
    mean, std = (torch.tensor(v, dtype=torch.float64, device=triton_device) for v in (MEAN, STD))
    expected = ((frames.double() / 255 - mean) / std).movedim(-1, -3)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
