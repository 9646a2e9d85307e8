"""One step of a guided flow: mix the velocities of the branches, renorm, and take Euler's step.

Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) by text and by image: strong guidance
makes velocities long, so the mix is brought back to the length of the first one, over the whole
image or token by token.

    mixed = text + text_scale * (main - text),  then  image + image_scale * (mixed - image)
    x <- x - dt * mixed * clamp(|main| / |mixed|, renorm_min, 1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, use_triton

__all__ = ["COLUMNS", "guided_euler", "guided_euler_torch", "guided_euler_triton"]

# Of the table: what is known of each request. The last four are flags: whether it is guided by text
# and by image, whether lengths are those of whole images, and whether image guidance comes after
# the renorm.
COLUMNS = (
    *("dt", "text_scale", "image_scale", "renorm_min"),
    *("by_text", "by_image", "whole", "image_last"),
)
_TINY = 1e-8
_ROWS = 64


def guided_euler(x: Tensor, velocities: Tensor, places: Tensor, table: Tensor) -> Tensor:
    """Latents at the next timestep, float32 `[requests, tokens, dim]`.

    Args:
        x: latents float32 `[requests, tokens, dim]`.
        velocities: of all branches of all requests, `[branches, tokens, dim]`.
        places: rows of `velocities` that are each request's main, text and image branch, int
            `[3, requests]`; that of main where a branch is not needed.
        table: float32 `[requests, 8]`, see `COLUMNS`.
    """
    compute = guided_euler_triton if use_triton(x) else guided_euler_torch
    return compute(x, velocities, places, table)


def guided_euler_torch(x: Tensor, velocities: Tensor, places: Tensor, table: Tensor) -> Tensor:
    """`guided_euler` in plain torch."""
    main, text, image = velocities.float()[places.long()].unbind(0)
    columns = table.view(len(table), -1, 1, 1).unbind(1)  # each [requests, 1, 1]
    dt, text_scale, image_scale, least = columns[:4]
    by_text, by_image, whole, image_last = (column.bool() for column in columns[4:])
    mixed = text + text_scale * (main - text)
    mixed = torch.where(by_image & ~image_last, image + image_scale * (mixed - image), mixed)
    mixed = mixed * _ratio(main, mixed, whole).maximum(least).clamp(max=1.0)
    mixed = torch.where(by_image & image_last, image + image_scale * (mixed - image), mixed)
    return x - torch.where(by_text, mixed, main) * dt


def _ratio(main: Tensor, mixed: Tensor, whole: Tensor) -> Tensor:
    """By how much `main` is longer, `[requests, tokens, 1]`: of images where `whole`, or tokens."""
    of_tokens = _length(main, -1) / (_length(mixed, -1) + _TINY)
    of_images = _length(main, (1, 2)) / (_length(mixed, (1, 2)) + _TINY)
    return torch.where(whole, of_images, of_tokens)


def _length(x: Tensor, over: int | tuple[int, int]) -> Tensor:
    return torch.linalg.vector_norm(x, dim=over, keepdim=True)


def guided_euler_triton(x: Tensor, velocities: Tensor, places: Tensor, table: Tensor) -> Tensor:
    """`guided_euler` as one Triton kernel."""
    requests, tokens, dim = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        _guided_euler_kernel[(requests,)](
            x.contiguous(),
            velocities.contiguous(),
            places,
            table,
            out,
            requests,
            tokens,
            TINY=_TINY,
            DIM=dim,
            BLOCK=next_power_of_2(dim),
            ROWS=_ROWS,
            num_warps=8,
        )
    return out


@jit
def _mix(main, text, image, text_scale, image_scale, by_image, image_last):
    """The velocity before its renorm."""
    mixed = text + text_scale * (main - text)
    first = image + image_scale * (mixed - image)
    return tl.where((by_image != 0) & (image_last == 0), first, mixed)


@jit(varying=("requests", "tokens"))
def _guided_euler_kernel(
    x,  # [requests, tokens, DIM], as are out and each branch of velocities
    velocities,
    places,  # [3, requests]
    table,  # [requests, 8]
    out,
    requests,
    tokens,
    TINY: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: one image. Lengths of whole images take a pass of their own."""
    request = tl.program_id(0)
    row = table + request * 8
    dt = tl.load(row)
    text_scale, image_scale = tl.load(row + 1), tl.load(row + 2)
    least = tl.load(row + 3)
    by_text, by_image = tl.load(row + 4), tl.load(row + 5)
    whole, image_last = tl.load(row + 6), tl.load(row + 7)
    size = tokens.to(tl.int64) * DIM
    main_at = velocities + tl.load(places + request).to(tl.int64) * size
    text_at = velocities + tl.load(places + requests + request).to(tl.int64) * size
    image_at = velocities + tl.load(places + 2 * requests + request).to(tl.int64) * size
    column = tl.arange(0, BLOCK)[None, :]
    main_square = tl.zeros((ROWS,), tl.float32)
    mixed_square = tl.zeros((ROWS,), tl.float32)
    if whole != 0:
        for start in range(0, tokens, ROWS):
            token = start + tl.arange(0, ROWS)[:, None]
            mask = (token < tokens) & (column < DIM)
            place = token * DIM + column
            main = tl.load(main_at + place, mask=mask, other=0.0).to(tl.float32)
            text = tl.load(text_at + place, mask=mask, other=0.0).to(tl.float32)
            image = tl.load(image_at + place, mask=mask, other=0.0).to(tl.float32)
            mixed = _mix(main, text, image, text_scale, image_scale, by_image, image_last)
            main_square += tl.sum(main * main, axis=1)
            mixed_square += tl.sum(mixed * mixed, axis=1)
    of_image = tl.sqrt(tl.sum(main_square)) / (tl.sqrt(tl.sum(mixed_square)) + TINY)
    for start in range(0, tokens, ROWS):
        token = start + tl.arange(0, ROWS)[:, None]
        mask = (token < tokens) & (column < DIM)
        place = token * DIM + column
        main = tl.load(main_at + place, mask=mask, other=0.0).to(tl.float32)
        text = tl.load(text_at + place, mask=mask, other=0.0).to(tl.float32)
        image = tl.load(image_at + place, mask=mask, other=0.0).to(tl.float32)
        mixed = _mix(main, text, image, text_scale, image_scale, by_image, image_last)
        main_length = tl.sqrt(tl.sum(main * main, axis=1))
        mixed_length = tl.sqrt(tl.sum(mixed * mixed, axis=1))
        ratio = tl.where(whole != 0, of_image, main_length / (mixed_length + TINY))
        mixed = mixed * tl.minimum(tl.maximum(ratio, least), 1.0)[:, None]
        last = image + image_scale * (mixed - image)
        mixed = tl.where((by_image != 0) & (image_last != 0), last, mixed)
        velocity = tl.where(by_text != 0, mixed, main)
        before = tl.load(x + request.to(tl.int64) * size + place, mask=mask, other=0.0)
        after = before - dt * velocity
        tl.store(out + request.to(tl.int64) * size + place, after, mask=mask)
