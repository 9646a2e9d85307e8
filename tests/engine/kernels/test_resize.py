"""Resizing of bytes, torch and Triton: as Pillow and torch do it, to the bit; normalised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mstar.engine.kernels.resize import Normal, resize, resize_triton, resized_on
from mstar.models import shrinking

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(9, 25, 4, 30), (5, 48, 5, 13), (6, 7, 1, 3), (3, 1, 9, 8)]
WAYS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def some(*shape: int) -> torch.Tensor:
    """Bytes, many of them black or white, so that bicubic sums leave 0 to 255."""
    values = torch.randint(-200, 456, shape, generator=torch.Generator().manual_seed(sum(shape)))
    return values.clamp_(0, 255).to(torch.uint8)


def by_pillow(image: torch.Tensor, size: list[int], filter: str) -> np.ndarray:
    """Along rows first: from version 13 on Pillow does what is less work first."""
    rows = Image.fromarray(image.numpy()).resize((size[1], image.shape[0]), WAYS[filter])
    return np.asarray(rows.resize((size[1], size[0]), WAYS[filter]))


@pytest.mark.parametrize("filter", WAYS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("function", [resize, resize_triton])
def test_the_bytes_are_those_of_pillow(function, sizes, filter, triton_device: str) -> None:
    height, width, *size = sizes
    image = some(height, width, 3)
    found = function(image.to(triton_device), tuple(size), filter)
    assert np.array_equal(found.cpu().numpy(), by_pillow(image, size, filter))


@pytest.mark.parametrize("filter", WAYS)
@pytest.mark.parametrize("sizes", SIZES[:1], ids=str)
@pytest.mark.parametrize("function", [resize, resize_triton])
def test_the_bytes_are_those_of_torch(function, sizes, filter, triton_device: str) -> None:
    height, width, *size = sizes
    images = some(2, height, width, 3)
    found = function(images.to(triton_device), tuple(size), filter, "torch")
    planar = images.permute(0, 3, 1, 2)
    expected = F.interpolate(planar, tuple(size), mode=filter, antialias=True)
    assert torch.equal(found.cpu(), expected.permute(0, 2, 3, 1))


def test_random_sizes_are_as_published() -> None:
    draw = np.random.default_rng(0)
    for _ in range(30):
        height, width, *size = draw.integers(1, 200, 4).tolist()
        image = some(height, width, 3)
        for filter in WAYS:
            found = resize(image, tuple(size), filter)
            assert np.array_equal(found.numpy(), by_pillow(image, size, filter))
            planar = image.permute(2, 0, 1)[None]
            other = F.interpolate(planar, tuple(size), mode=filter, antialias=True)[0]
            found = resize(image, tuple(size), filter, "torch")
            assert torch.equal(found, other.permute(1, 2, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(5, 7), (4, 7), (9, 3)], ids=str)
@pytest.mark.parametrize("function", [resize, resize_triton])
def test_normalised_pixels_match_float64(function, size, dtype, triton_device: str) -> None:
    frames = some(1, 2, 6, 8, 3)[..., 1:, 1:, :].to(triton_device)  # not contiguous
    found = function(frames, size, "bicubic", normal=Normal(MEAN, STD, dtype))
    assert found.dtype == dtype
    assert found.is_contiguous()
    levels = resize(frames.cpu(), size, "bicubic").double()
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (MEAN, STD))
    expected = ((levels / 255 - mean) / std).movedim(-1, -3)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double().cpu(), expected, atol=tolerance, rtol=tolerance)


def test_nothing_comes_of_nothing(triton_device: str) -> None:
    none = torch.empty(0, 4, 5, 3, dtype=torch.uint8, device=triton_device)
    assert resize_triton(none, (6, 7), "bilinear").shape == (0, 6, 7, 3)
    normal = Normal(MEAN, STD, torch.float32)
    assert resize_triton(none, (4, 5), "bilinear", normal=normal).shape == (0, 3, 4, 5)


def test_what_has_its_size_is_copied(triton_device: str) -> None:
    image = some(4, 5, 3).to(triton_device)
    for function in (resize, resize_triton):
        found = function(image, (4, 5), "bicubic")
        assert torch.equal(found, image)
        assert found.data_ptr() != image.data_ptr()


def test_a_model_on_a_gpu_resizes_there_and_sees_the_same(monkeypatch) -> None:
    def here(device: torch.device, image: np.ndarray, size: tuple[int, int], filter: str):
        assert device.type == "cuda"
        return resize(torch.from_numpy(image.copy()), size, filter).numpy()

    monkeypatch.setattr(shrinking, "resized_on", here)
    image = Image.fromarray(some(60, 80, 3).numpy())
    found = shrinking.bicubic(image, (56, 42), torch.device("cuda"))
    assert np.array_equal(np.asarray(found), np.asarray(shrinking.bicubic(image, (56, 42))))
    assert shrinking.bicubic(image, image.size, torch.device("cuda")) is image


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["pillow", "torch"])
def test_on_a_gpu_the_bytes_are_the_same(rounding: str) -> None:
    image = some(301, 407, 3)
    for filter in WAYS:
        expected = resize(image, (120, 500), filter, rounding).numpy()
        given = torch.device("cuda"), image.numpy(), (120, 500), filter, rounding
        assert np.array_equal(resized_on(*given), expected)
