"""Attention over a paged KV cache: one mixed batch of prefills, extensions and decode steps.

A page pool holds keys and values as ``[pages, page_size, kv_heads, head_dim]``; a sequence owns a
list of page numbers, its block table (vLLM, Kwon et al. 2023, section 4.1). `PagedBatch` describes
one step's batch once, on the host, and every layer reuses it.

On CPU each sequence is computed by itself over a *view* of the pool (a gathered copy where its
pages are not consecutive), so its result does not depend on what else is in the batch. Decode steps
of several short sequences are computed together over a padded copy: that saves most of the time,
and changes the last bits. On CUDA the Triton kernels in `paged_decode` and `paged_extend` run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mstar.engine.kernels.dispatch import use_triton
from mstar.engine.kernels.onednn import has_onednn, product
from mstar.engine.kernels.paged_batch import BatchTensors, PagedBatch, PagedSpan, tensors_of
from mstar.engine.kernels.paged_decode import paged_decode_few_triton, paged_decode_triton
from mstar.engine.kernels.paged_extend import paged_extend_triton
from mstar.engine.kernels.paged_tiles import DECODE_FEW, get_ready, takes_few

__all__ = ["paged_attention", "paged_attention_torch", "paged_attention_triton"]

_SPAN = 32  # new tokens from which on products of their own beat the fused call
_SCORES = 1 << 19  # computed at a time: they stay in the cache of a core
_SHORT = 1 << 14  # elements of a sequence's keys up to which copies cost less than calls


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: PagedBatch | BatchTensors,
    scale: float,
) -> Tensor:
    """Attention of the batch's new tokens over their sequences' cached keys and values.

    Args:
        q: ``[T, heads, head_dim]``, the new tokens of all sequences, concatenated.
        k_pages, v_pages: ``[pages, page_size, kv_heads, head_dim]``; ``heads`` is a multiple of
            ``kv_heads``, and query head h reads kv head ``h // (heads // kv_heads)`` (GQA).
        batch: a `PagedBatch`; or, for a captured CUDA graph, static `BatchTensors`.
        scale: factor on the scores before the softmax, which is computed in float32.

    Returns:
        ``[T, heads, head_dim]`` in the dtype of ``q``.
    """
    if use_triton(q):
        return paged_attention_triton(q, k_pages, v_pages, tensors_of(batch, q.device), scale)
    if not isinstance(batch, PagedBatch):
        raise TypeError("paged_attention: BatchTensors need a CUDA device and Triton")
    return paged_attention_torch(q, k_pages, v_pages, batch, scale)


def paged_attention_triton(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: BatchTensors, scale: float
) -> Tensor:
    """`paged_attention` with the Triton kernels.

    Which of them a sequence goes through depends on itself alone, also in a mixed batch: decode
    with one new token, and with up to `FEW` if it has `FEW_KEYS` keys; extend otherwise.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not takes_few(q, k_pages):
        batch = batch._replace(few=None)
    elif q.is_cuda and batch.max_query_len > 1:  # the first prompt may have no such sequence
        get_ready(DECODE_FEW, q, k_pages, v_pages, paged_decode_few_triton)
    if batch.max_query_len > 1:
        paged_extend_triton(q, k_pages, v_pages, batch, scale, out)
        paged_decode_few_triton(q, k_pages, v_pages, batch, scale, out)
    if batch.has_decode:
        paged_decode_triton(q, k_pages, v_pages, batch, scale, out)
    return out


def paged_attention_torch(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    """`paged_attention` in plain torch, sequence by sequence (the CPU path)."""
    spans = batch.spans
    if not spans:
        return torch.empty_like(q)
    if (size := k_pages.shape[1]) != batch.page_size:
        raise ValueError(f"the pool has pages of {size} slots, the batch of {batch.page_size}")
    if batch.all_decode and len(spans) > 1 and q.dtype == torch.float32:
        longest = max(span.kv_len for span in spans) * k_pages.shape[2] * k_pages.shape[3]
        if longest <= _SHORT and k_pages.is_contiguous() and v_pages.is_contiguous():
            return _decode_together(q, k_pages, v_pages, batch, scale)
    keys, values = _Views(k_pages, batch, "k"), _Views(v_pages, batch, "v")
    if batch.all_decode:
        return _decode(q, spans, keys, values, scale)
    outputs = []
    for rows, span in zip(q.split([span.query_len for span in spans]), spans, strict=True):
        if span.query_len == 1:
            outputs.append(_decode(rows, [span], keys, values, scale))
            continue
        plain = span.query_len >= _SPAN and not (span.masked or span.is_causal)
        if plain and has_onednn(q):
            outputs.append(_see_all(rows, keys.of(span), values.of(span), scale))
            continue
        out = F.scaled_dot_product_attention(
            rows.transpose(0, 1).unsqueeze(0),
            keys.of(span).unsqueeze(0),
            values.of(span).unsqueeze(0),
            attn_mask=batch.mask(span, q.dtype, q.device) if span.masked else None,
            is_causal=span.is_causal,
            scale=scale,
            enable_gqa=keys.heads != q.shape[1],
        )
        outputs.append(out[0].transpose(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _see_all(rows: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Full attention of one sequence's new tokens ``[n, heads, dim]``, float32, over all its keys
    ``[kv_heads, kv_len, dim]``, one kv head and some rows at a time.

    On an AMD EPYC oneDNN's products take two thirds of the time of the fused call (one core, 12
    heads of 64 over 4: 1026 x 1284 34 against 51 ms, 258 x 1567 12 against 20 ms).
    """
    tokens, heads, dim = rows.shape
    groups, seen, _ = keys.shape
    q = (rows * scale).view(tokens, groups, -1, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)
    out = torch.empty_like(q)
    for head in range(groups):
        key, value = keys[head].contiguous(), values[head].t().contiguous()
        for start in range(0, q.shape[1], max(1, _SCORES // seen)):
            part = slice(start, start + max(1, _SCORES // seen))
            weights = torch.softmax(product(q[head, part], key), -1)
            out[head, part] = product(weights, value)
    return out.view(groups, -1, tokens, dim).permute(2, 0, 1, 3).reshape(tokens, heads, dim)


def _decode(
    q: Tensor, spans: Sequence[PagedSpan], keys: _Views, values: _Views, scale: float
) -> Tensor:
    """One new token per span: ``[T, heads, dim]`` to ``[T, heads, dim]``.

    The query heads of one kv head are the rows of one product, so keys are never expanded. In
    float32 three plain products beat the fused call by 2 us or more; 16-bit products are slow.
    """
    tokens, heads, dim = q.shape
    shape = (keys.heads, heads // keys.heads, dim)
    outputs = []
    if q.dtype == torch.float32:
        nothing = q.new_empty(1, 1, 1)
        for row, span in zip(q.view(tokens, *shape).unbind(0), spans, strict=True):
            key = keys.of(span, transposed=True)
            weights = torch.baddbmm(nothing, row, key, beta=0, alpha=scale).softmax(-1)
            outputs.append(torch.bmm(weights, values.of(span)))
    else:
        for row, span in zip(q.view(tokens, 1, *shape).unbind(0), spans, strict=True):
            key, value = keys.of(span).unsqueeze(0), values.of(span).unsqueeze(0)
            outputs.append(F.scaled_dot_product_attention(row, key, value, scale=scale))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.reshape(tokens, heads, dim)


def _decode_together(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    """`_decode` of all sequences in two products, over copies of all keys and values."""
    rows, mask = batch.padded(k_pages.shape[2])
    shape = (len(mask), -1, q.shape[2])
    keys, values = (
        pages.view(-1, q.shape[2]).index_select(0, rows).view(shape) for pages in (k_pages, v_pages)
    )
    scores = torch.baddbmm(mask, q.reshape(shape), keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(q.shape)


class _Views:
    """Keys (or values) of single sequences as views of the pool or of the gathered pages."""

    def __init__(self, pages: Tensor, batch: PagedBatch, name: str) -> None:
        _, size, self.heads, self.dim = pages.shape
        page, *strides = pages.stride()
        if page != size * strides[0]:
            pages = pages.contiguous()  # slots of neighbouring pages must be evenly spaced
            page, *strides = pages.stride()
        self.pool = (pages, pages.storage_offset(), *strides)
        gathered = batch.gather(pages, name)
        self.gathered = (gathered, 0, self.heads * self.dim, self.dim, 1)

    def of(self, span: PagedSpan, transposed: bool = False) -> Tensor:
        """``[kv_heads, kv_len, head_dim]``, or ``[kv_heads, head_dim, kv_len]`` if transposed.

        One `as_strided` costs 1 us where slicing costs 2.5.
        """
        source, base, row, head, element = self.gathered if span.gathered else self.pool
        start = base + span.start * row
        if transposed:
            return source.as_strided(
                (self.heads, self.dim, span.kv_len), (head, element, row), start
            )
        return source.as_strided((self.heads, span.kv_len, self.dim), (head, row, element), start)
