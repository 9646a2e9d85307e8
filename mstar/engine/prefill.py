"""Feeding a prompt of several kinds of spans, as far as it is not in the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mstar.engine.kvcache import KVCache
from mstar.engine.lm import LanguageModel
from mstar.engine.spans import Span
from mstar.types import Usage

__all__ = ["PromptSpan", "prefill"]


@dataclass(frozen=True)
class PromptSpan:
    """Part of a prompt: text, or the tokens of a medium that see each other.

    Args:
        content: what the tokens are (see `KVCache.reuse`); for text, their ids.
        positions: rotary positions.
        embed: makes the embeddings `[tokens, hidden]`; not called if they are in the prefix cache.
            `None` for text.
        lead: see `Span`.
    """

    content: Sequence[int]
    positions: Sequence[int]
    embed: Callable[[], Coroutine[Any, Any, Tensor]] | None = None
    lead: int = 0


async def prefill(
    lm: LanguageModel, kv: KVCache, spans: Sequence[PromptSpan], usage: Usage | None = None
) -> None:
    """Append spans to a sequence: text causally and in chunks, media as a whole.

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
