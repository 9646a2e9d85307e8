"""Rotary position embedding fused with the write into the paged KV cache.

Takes the output of a fused query-key-value projection apart, rotates queries and keys (Su et al.
2021, RoFormer, equation 34, in the half-split layout: element i is paired with i + head_dim / 2)
and stores keys and values in their slots:

    rot(x) = x * [cos, cos] + [-x2, x1] * [sin, sin],   x = [x1, x2]

Networks with QK-norm (Henry et al. 2020) norm every query and key head before that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mstar.engine.kernels.dispatch import jit, next_power_of_2, tl, triton, use_triton
from mstar.engine.kernels.rms_norm import unit_rms

__all__ = [
    "HeadNorms",
    "paired_angles",
    "rotary_store",
    "rotary_store_torch",
    "rotary_store_triton",
]

_FEW = 8  # tokens up to which fewer operations count for more than a copy


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """Weights of the RMS norms of query and key heads, each ``[head_dim]``."""

    query: Tensor
    key: Tensor
    eps: float
    _rows: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def rows(self, heads: int, kv_heads: int) -> Tensor:
        """The weight of every query and key head, float32 ``[heads + kv_heads, head_dim]``."""
        found = self._rows.get((heads, kv_heads))
        if found is None:
            parts = self.query.expand(heads, -1), self.key.expand(kv_heads, -1)
            found = self._rows[heads, kv_heads] = torch.cat(parts).float()
        return found


def rotary_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys in float32, store keys and values, return the queries.

    Args:
        qkv: ``[T, (num_heads + 2 * num_kv_heads) * head_dim]``: queries, keys, values.
        cos, sin: ``[T, head_dim // 2]`` float32, the angles of each token's position.
        k_pages, v_pages: ``[pages, page_size, num_kv_heads, head_dim]``, written in place.
        slots: ``[T]`` int64, ``page * page_size + offset``; on CUDA, -1 stores nothing (the padding
            rows of a captured graph).
        num_heads, num_kv_heads: query heads, key and value heads.
        norms: applied to each query and key head first, in float32.
        out: contiguous ``[T, num_heads, head_dim]`` for the queries.

    Returns:
        Rotated queries ``[T, num_heads, head_dim]`` (on CPU a view whose tokens are further apart).
    """
    compute = rotary_store_triton if use_triton(qkv) else rotary_store_torch
    return compute(qkv, cos, sin, k_pages, v_pages, slots, num_heads, num_kv_heads, norms, out)


def paired_angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The angles of a few tokens on a CPU as both halves of a head need them, ``[T, 1, 1,
    head_dim // 2]`` and ``[T, 1, 2, head_dim // 2]``: they are the same in all layers. Others stay
    as they are."""
    if use_triton(cos) or len(cos) > _FEW:
        return cos, sin
    return cos[:, None, None], torch.stack([-sin, sin], 1).unsqueeze(1)


def rotary_store_torch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`rotary_store` in plain torch; queries and keys are neighbours and turn in one go.

    Args:
        cos, sin: or what `paired_angles` makes of them.
    """
    tokens, dim = qkv.shape[0], k_pages.shape[3]
    turning = num_heads + num_kv_heads
    every = qkv.view(tokens, turning + num_kv_heads, dim)
    heads, values = every.split_with_sizes((turning, num_kv_heads), 1)
    if heads.dtype != torch.float32:
        heads = heads.float()
    if norms is not None:
        heads = unit_rms(heads, norms.eps).mul_(norms.rows(num_heads, num_kv_heads))
    pairs = heads.view(tokens, turning, 2, dim // 2)
    if sin.dim() == 4:
        turned = (pairs * cos).addcmul_(pairs.flip(2), sin)
    else:
        turned = pairs * cos.view(tokens, 1, 1, dim // 2)
        x1, x2 = pairs.unbind(2)
        y1, y2 = turned.unbind(2)
        sin = sin.unsqueeze(1)
        y1.addcmul_(x2, sin, value=-1)
        y2.addcmul_(x1, sin)
    turned = turned.view(tokens, turning, dim)
    if turned.dtype != qkv.dtype:
        turned = turned.to(qkv.dtype)
    queries, keys = turned.split_with_sizes((num_heads, num_kv_heads), 1)
    _store(k_pages, slots, keys)
    _store(v_pages, slots, values)
    return queries if out is None else out.copy_(queries)


def _store(pages: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Write rows ``[T, kv_heads, head_dim]`` into their slots."""
    _, size, heads, dim = pages.shape
    page, slot, *_ = pages.stride()
    if page == size * slot:
        pages.view(-1, heads, dim).index_copy_(0, slots, rows)
    else:  # a pool whose layers are interleaved
        pages[slots // size, slots % size] = rows


def rotary_store_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`rotary_store` as one Triton kernel."""
    tokens, (_, page_size, _, dim) = len(qkv), k_pages.shape
    if out is None:
        out = qkv.new_empty(tokens, num_heads, dim)
    query_norm, key_norm = (norms.query, norms.key) if norms is not None else (cos, cos)
    block = next_power_of_2(dim // 2)
    block_heads = min(max(1, 1024 // block), next_power_of_2(num_heads + 2 * num_kv_heads))
    if tokens:
        _rotary_store_kernel[(tokens, triton.cdiv(num_heads + 2 * num_kv_heads, block_heads))](
            qkv,
            cos,
            sin,
            k_pages,
            v_pages,
            slots,
            out,
            query_norm,
            key_norm,
            norms.eps if norms is not None else 0.0,
            qkv.stride(0),
            cos.stride(0),
            sin.stride(0),
            *k_pages.stride()[:3],
            *v_pages.stride()[:3],
            HEADS=num_heads,
            KV_HEADS=num_kv_heads,
            HALF=dim // 2,
            PAGE_SIZE=page_size,
            BLOCK_HEADS=block_heads,
            BLOCK=block,
            NORMED=norms is not None,
            num_warps=4,
        )
    return out


@jit(varying=("slots",))
def _rotary_store_kernel(
    qkv,  # [tokens, (HEADS + 2 * KV_HEADS) * 2 * HALF]
    cos,  # [tokens, HALF]
    sin,  # [tokens, HALF]
    k_pages,  # [pages, PAGE_SIZE, KV_HEADS, 2 * HALF]
    v_pages,
    slots,  # [tokens], -1: store nothing; may be a part that begins anywhere
    out,  # [tokens, HEADS, 2 * HALF], contiguous
    query_norm,  # [2 * HALF], read where NORMED
    key_norm,
    eps,
    qkv_stride,
    cos_stride,
    sin_stride,
    k_page_stride,
    k_slot_stride,
    k_head_stride,
    v_page_stride,
    v_slot_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMED: tl.constexpr,
):
    """One program: BLOCK_HEADS heads of one token, of whichever kind they are."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < HALF
    mask = (head < HEADS + 2 * KV_HEADS) & inside
    source = qkv + token * qkv_stride + head * (2 * HALF) + column
    x1 = tl.load(source, mask=mask, other=0.0)
    x2 = tl.load(source + HALF, mask=mask, other=0.0)
    c = tl.load(cos + token * cos_stride + column, mask=inside, other=0.0)
    s = tl.load(sin + token * sin_stride + column, mask=inside, other=0.0)
    a, b = x1.to(tl.float32), x2.to(tl.float32)
    if NORMED:
        is_query_head = head < HEADS
        q1 = tl.load(query_norm + column, mask=inside, other=0.0).to(tl.float32)
        q2 = tl.load(query_norm + HALF + column, mask=inside, other=0.0).to(tl.float32)
        k1 = tl.load(key_norm + column, mask=inside, other=0.0).to(tl.float32)
        k2 = tl.load(key_norm + HALF + column, mask=inside, other=0.0).to(tl.float32)
        mean_square = tl.sum(a * a + b * b, axis=1) / (2 * HALF)
        scale = tl.rsqrt(mean_square + eps)[:, None]
        a = a * scale * tl.where(is_query_head, q1, k1)
        b = b * scale * tl.where(is_query_head, q2, k2)
    y1 = (a * c - b * s).to(x1.dtype)
    y2 = (b * c + a * s).to(x1.dtype)

    is_query = mask & (head < HEADS)
    target = out + (token * HEADS + head) * (2 * HALF) + column
    tl.store(target, y1, mask=is_query)
    tl.store(target + HALF, y2, mask=is_query)

    slot = tl.load(slots + token)
    if slot >= 0:
        page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
        is_key = mask & (head >= HEADS) & (head < HEADS + KV_HEADS)
        target = k_pages + page * k_page_stride + offset * k_slot_stride
        target = target + (head - HEADS) * k_head_stride + column
        tl.store(target, y1, mask=is_key)
        tl.store(target + HALF, y2, mask=is_key)
        is_value = mask & (head >= HEADS + KV_HEADS)
        target = v_pages + page * v_page_stride + offset * v_slot_stride
        target = target + (head - HEADS - KV_HEADS) * v_head_stride + column
        tl.store(target, x1, mask=is_value)
        tl.store(target + HALF, x2, mask=is_value)
