"""Feeding a prompt of several kinds of spans, as far as it is not in the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mstar.engine.kernels.staging import to_device
from mstar.engine.kvcache import KVCache
from mstar.engine.lm import LanguageModel
from mstar.engine.sampling import SamplerState
from mstar.engine.spans import Span, Step
from mstar.engine.traps import gather
from mstar.types import Usage

__all__ = ["PromptSpan", "prefill", "prefill_causal"]


@dataclass(frozen=True)
class PromptSpan:
    """Part of a prompt: text, or the tokens of a medium.

    Args:
        content: what the tokens are (see `KVCache.reuse`); for text, their ids.
        positions: rotary positions, see `Span`.
        embed: makes the embeddings `[tokens, hidden]`; not called if they are in the prefix cache.
            `None` for text.
        lead: see `Span`.
    """

    content: Sequence[int]
    positions: Sequence[int] | Tensor
    embed: Callable[[], Coroutine[Any, Any, Tensor]] | None = None
    lead: int = 0


async def prefill(
    lm: LanguageModel, kv: KVCache, spans: Sequence[PromptSpan], usage: Usage | None = None
) -> None:
    """Append spans to a sequence: text causally and in chunks, media, whose tokens see each other,
    as a whole.

    Args:
        kv: if it is empty, what others have left of the same spans is reused.
    """
    done = kv.length
    content = [number for span in spans for number in span.content]
    if not done:
        whole, start = [], 0
        for span in spans:
            if span.embed is not None:
                whole.append((start, start + len(span.content)))
            start += len(span.content)
        # Whatever follows is computed, so that all of this may come from the cache.
        reused = kv.reuse([*content, 0], whole)
    else:
        reused = 0
    if usage is not None:
        usage.prompt_tokens += len(content)
        usage.cached_tokens += reused
    end = 0
    for span in spans:
        start, end = end, end + len(span.content)
        if end <= reused:
            continue
        if span.embed is None:
            await _feed(lm, kv, span, max(reused - start, 0))
        else:
            count = len(span.content)
            inputs = await span.embed()
            await lm(
                Span(
                    kv,
                    inputs,
                    count,
                    span.positions,
                    causal=False,
                    lead=span.lead,
                    content=span.content,
                )
            )
            kv.seal()


async def _feed(lm: LanguageModel, kv: KVCache, span: PromptSpan, first: int) -> None:
    for start in range(first, len(span.content), lm.token_budget):
        rows = slice(start, start + lm.token_budget)
        ids = span.content[rows]
        await lm(Span(kv, ids, len(ids), span.positions[rows], content=ids))


async def prefill_causal(
    lm: LanguageModel,
    kv: KVCache,
    spans: Sequence[PromptSpan],
    *,
    sampler: SamplerState | None = None,
    usage: Usage | None = None,
    most_reused: int | None = None,
    hear: Callable[[int, Tensor], None] | None = None,
) -> Step:
    """Begin a sequence with spans of which no token sees a later one, in chunks.

    The encoders run together, before the first chunk.

    Args:
        spans: with positions `[3, tokens]`.
        most_reused: take no more than so many tokens from the prefix cache.
        hear: called with the hidden states `[tokens, hidden]` of each chunk, and the place of its
            first token.

    Returns:
        The step of the last chunk; with a `sampler` it has the token that follows.
    """
    content = [number for span in spans for number in span.content]
    reused = kv.reuse(content, most=most_reused)
    if usage is not None:
        usage.prompt_tokens += len(content)
        usage.cached_tokens += reused
    starts = list(accumulate((len(span.content) for span in spans), initial=0))
    made = await gather(*map(_embedded, spans, (end > reused for end in starts[1:])))
    for first in range(reused, len(content), lm.token_budget):
        last = min(first + lm.token_budget, len(content))
        inputs, positions = [], []
        for start, span, rows in zip(starts, spans, made, strict=False):
            here = slice(max(first - start, 0), max(last - start, 0))
            if not (part := span.content[here]):
                continue
            positions.append(span.positions[:, here])
            if rows is None:
                inputs.append(lm.network.embed(to_device(part, torch.int64, lm.device)))
            else:
                inputs.append(rows[here])
        step = await lm(
            Span(
                kv,
                torch.cat(inputs),
                last - first,
                torch.cat(positions, 1),
                sampler=sampler if last == len(content) else None,
                hidden=hear is not None,
                content=content[first:last],
            )
        )
        if hear is not None:
            hear(first, step.hidden)
    return step


async def _embedded(span: PromptSpan, wanted: bool) -> Tensor | None:
    return await span.embed() if wanted and span.embed is not None else None
