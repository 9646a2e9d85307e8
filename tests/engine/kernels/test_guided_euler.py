"""Guided Euler steps: the kernel against torch, and torch against the formula."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kernels.guided_euler import guided_euler_torch, guided_euler_triton

# dt, text scale, image scale, least, by text, by image, whole, image last
KINDS = [
    (0.1, 4.0, 1.5, 0.0, 1, 1, 1, 0),
    (0.2, 4.0, 1.5, 0.9, 1, 1, 0, 0),
    (0.3, 4.0, 2.0, 0.0, 1, 1, 0, 1),
    (0.4, 4.0, 1.0, 0.0, 1, 0, 1, 0),
    (0.5, 1.15, 1.1, 0.0, 1, 1, 0, 0),
    (0.6, 1.0, 1.0, 0.0, 0, 0, 1, 0),
]


def inputs(tokens: int, dim: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    count = len(KINDS)
    x = torch.randn(count, tokens, dim, generator=generator)
    velocities = torch.randn(3 * count, tokens, dim, generator=generator)
    places = torch.randperm(3 * count, generator=generator).view(3, count).to(torch.int32)
    places[1:, -1] = places[0, -1]
    return tuple(y.to(device) for y in (x, velocities, places, torch.tensor(KINDS)))


@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (48, 64), (130, 20), (0, 64)])
def test_the_kernel_matches_torch(tokens: int, dim: int, triton_device: str) -> None:
    arguments = inputs(tokens, dim, triton_device)
    expected = guided_euler_torch(*arguments)
    torch.testing.assert_close(guided_euler_triton(*arguments), expected, atol=1e-5, rtol=1e-5)


def test_a_request_without_guidance_takes_a_plain_step() -> None:
    x, velocities, places, table = inputs(5, 64)
    found = guided_euler_torch(x, velocities, places, table)[-1]
    torch.testing.assert_close(found, x[-1] - table[-1, 0] * velocities[places[0, -1]])


@pytest.mark.gpu
def test_a_large_image_on_a_gpu() -> None:
    arguments = inputs(4096, 64, "cuda")
    torch.testing.assert_close(
        guided_euler_triton(*arguments), guided_euler_torch(*arguments), atol=1e-4, rtol=1e-4
    )
