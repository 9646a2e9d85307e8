"""A decoder network as a node: continuous batching, chunked prefill, decoding.

Calls are *spans*: some new tokens of one sequence. A batch mixes prefill chunks and decode steps of
any number of sequences. `feed` and `generate` are coroutines above that; a walk uses them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mstar.engine.captured import record
from mstar.engine.graphs import DecodeGraphs
from mstar.engine.kernels.paged_batch import PagedBatch
from mstar.engine.kernels.staging import pack, to_device
from mstar.engine.kvcache import KVCache, KVGroup, KVLayout, KVPool
from mstar.engine.layers.attention import AttentionContext
from mstar.engine.layout import Layout, Piece
from mstar.engine.logprobs import LogProbs, TokenScores
from mstar.engine.node import Node
from mstar.engine.paged_context import PagedContext
from mstar.engine.pages import PagesExhausted
from mstar.engine.sampler import sampler_for
from mstar.engine.sampling import SamplerState, SamplingParams
from mstar.engine.spans import Span, Step, Tokens, gather_ids
from mstar.engine.traps import Call
from mstar.errors import OutOfMemory
from mstar.types import Usage

__all__ = ["DecoderNetwork", "Generation", "LanguageModel", "Span", "Step"]

Feed = Callable[[SamplerState], Awaitable[Step]]


class DecoderNetwork(Protocol):
    """What a network must offer to be run as a `LanguageModel`."""

    kv_layout: KVLayout
    vocab_size: int

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings `[tokens, hidden]` of ids `[tokens]`."""

    def __call__(
        self, inputs: Tensor, positions: Tensor, context: AttentionContext, lead: int = 0
    ) -> Tensor:
        """Normed hidden states `[tokens, hidden]` of ids `[tokens]` or embeddings.

        Positions are int64 `[tokens]`; a network whose spans say so gets float32, `[tokens]` or
        `[3, tokens]`. One of two experts runs the first `lead` tokens through the second one.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores float32 `[tokens, vocab]`."""


class LanguageModel(Node):
    """A decoder network, its KV cache and its sampler.

    Args:
        network: the decoder.
        pool: its KV cache.
        max_batch: most sequences in a batch.
        token_budget: most prefill tokens in a batch; prompts are fed in chunks of that size.
        span_budget: most tokens of spans in a batch (default: `token_budget`). Spans that cannot be
            fed in chunks, those of images, may be longer than a chunk; one always fits.
        look_ahead: launch a sequence's next step before its last token is read (default: on a GPU).
            Stop conditions are then seen one step late and the surplus token is dropped.
        graphs: capture decode steps as CUDA graphs (on a GPU).
        fractions: whether positions may be fractions, in captured steps, too.
    """

    def __init__(
        self,
        name: str,
        network: DecoderNetwork,
        pool: KVPool,
        *,
        max_batch: int = 64,
        token_budget: int = 512,
        span_budget: int | None = None,
        look_ahead: bool | None = None,
        graphs: bool = True,
        fractions: bool = False,
    ) -> None:
        super().__init__(name, self._run, max_batch=max_batch)
        self.network = network
        self.pool = pool
        self.token_budget = token_budget
        self.span_budget = max(token_budget, span_budget or 0)
        self.device = pool.tensor.device
        self.look_ahead = self.device.type == "cuda" if look_ahead is None else look_ahead
        self.sampler = sampler_for(self.device, network.vocab_size)
        self.graphs: DecodeGraphs | None = None
        self._use_graphs = graphs and self.device.type == "cuda"
        self._fractions = fractions

    # -- for walks ---------------------------------------------------------------------------

    def open_cache(self) -> KVCache:
        """An empty sequence; use it in a `with` statement."""
        return self.pool.open()

    async def feed(
        self,
        kv: KVCache,
        ids: Sequence[int],
        *,
        sampler: SamplerState | None = None,
        usage: Usage | None = None,
    ) -> Step:
        """Prefill token ids in chunks, reusing cached pages if the sequence is empty.

        Returns:
            The step of the last chunk; with a `sampler` it has the token that follows.
        """
        first = kv.reuse(ids)
        if usage is not None:
            usage.prompt_tokens += len(ids)
            usage.cached_tokens += first
        while True:
            chunk = ids[first : first + self.token_budget]
            first += len(chunk)
            last = first >= len(ids)
            step = await self(
                Span(kv, chunk, len(chunk), sampler=sampler if last else None, content=chunk)
            )
            if last:
                return step

    def generate(
        self,
        kv: KVCache,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        usage: Usage | None = None,
        feed: Feed | None = None,
    ) -> Generation:
        """Prefill `prompt` and decode. Iterate for tokens; stop tokens are not among them.

        Args:
            feed: prefills instead, where the prompt is more than ids; it returns a step that used
                the sampler that it is given.
        """
        if feed is None:

            def feed(sampler: SamplerState) -> Awaitable[Step]:
                return self.feed(kv, prompt, sampler=sampler, usage=usage)

        return Generation(self, kv, prompt, params, usage, feed)

    # -- the node ----------------------------------------------------------------------------

    def bind(self, schedule: Callable[[Node], None]) -> None:
        """Tell whom to notify when calls that waited for pages may go on."""
        self.pool.on_release.append(lambda: self._only and schedule(self))

    def enqueue(self, call: Call) -> None:
        """See `Node.enqueue`.

        Raises:
            ValueError: the parts of the span are not of the same length.
        """
        call.payload.check()
        call.payload.kv.group.waiting += 1
        super().enqueue(call)

    def withdrawn(self, call: Call) -> None:
        """See `Node.withdrawn`. The sequence is idle now: others may take its pages."""
        if call in self._only:
            self._only.remove(call)
            call.payload.kv.group.waiting -= 1
            self.pool.released()

    def take(self) -> list[Call]:
        """The next batch: eldest sequences first, each with its pages reserved."""
        calls = sorted(self._only, key=lambda call: call.payload.kv.group.age)
        batch: dict[KVCache, Call] = {}
        failed: list[tuple[Call, Exception]] = []
        busy: set[KVGroup] = set()
        room, starved = self.span_budget, False
        for call in calls:
            span: Span = call.payload
            if len(batch) == self.max_batch:
                break
            if span.kv in batch:  # one span after the other
                continue
            if span.count > 1 and span.count > room and room < self.span_budget:
                continue
            if (starved or self._must_wait(span, busy)) and not self._has_pages(span):
                starved = True
                continue
            group = span.kv.group
            try:
                span.kv.reserve(span.count, busy)
            except PagesExhausted as error:
                starved = True
                if not busy and self.pool.is_alone(group):
                    group.waiting -= 1
                    failed.append((call, self._never_fits(span, error)))
                continue
            except Exception as error:
                group.waiting -= 1
                failed.append((call, error))
                continue
            busy.add(group)
            batch[span.kv] = call
            if span.count > 1:
                room -= span.count
        gone = {*batch.values(), *(call for call, _ in failed)}
        kept = [call for call in self._only if call not in gone]
        self._only.clear()
        self._only.extend(kept)
        for kv in batch:
            kv.group.waiting -= 1
        for call, error in failed:
            waiter, call.waiter = call.waiter, None
            if waiter is not None:
                waiter.reject(error)
        if not failed:
            return list(batch.values())
        # A failure may have ended its request, and with it other calls: of this batch, even.
        self.pool.released()
        return [call for call in batch.values() if call.waiter is not None]

    @property
    def buckets(self) -> list[int]:
        """Batch sizes that steps are captured for."""
        most = self.max_batch
        return [*(size for size in (1, 2, 4, *range(8, most, 8)) if size < most), most]

    def warmup(self) -> None:
        """Capture what is captured. Afterwards decode steps up to `max_batch` only replay."""
        self.sampler.warmup()
        if self._use_graphs and self.graphs is None:
            graphs = DecodeGraphs(
                self._decode,
                self.pool,
                self.buckets,
                self.pool.capacity,
                record(),
                fractions=self._fractions,
            )
            graphs.capture()
            self.graphs = graphs

    # -- inside ------------------------------------------------------------------------------

    def _has_pages(self, span: Span) -> bool:
        kv = span.kv
        needed = self.pool.pages_for(kv.length + span.count)
        return not kv.group.is_out and needed <= len(kv.pages)

    def _must_wait(self, span: Span, busy: set[KVGroup]) -> bool:
        """Whether a sequence should not come in yet, because those that run will soon grow."""
        kv = span.kv
        if not busy or (kv.pages and not kv.group.is_out):
            return False
        needed = self.pool.pages_for(kv.length + span.count)
        return self.pool.table.available < needed + len(busy)

    def _never_fits(self, span: Span, error: PagesExhausted) -> OutOfMemory:
        """Nobody else is left to make room."""
        return OutOfMemory(
            f"the KV cache of {self.name} holds {self.pool.capacity} tokens, too few for a "
            f"sequence of {span.kv.length + span.count} (with its forks): {error}"
        )

    def _run(self, spans: list[Span]) -> list[Step]:
        layout = Layout(spans)
        kv_lens = [piece.span.kv.length + piece.span.count for piece in layout.pieces]
        tables = [piece.span.kv.pages for piece in layout.pieces]
        rows = [index for index, span in enumerate(spans) if span.sampler is not None]
        samplers = [spans[row].sampler for row in rows]
        hidden, logits = self._forward(layout, kv_lens, tables, [spans[row] for row in rows])
        tokens, scores = None, {}
        if rows:
            scores = _scores(logits, samplers)
            tokens = Tokens(self.sampler.sample(logits, samplers))
        place = {row: index for index, row in enumerate(rows)}
        steps = []
        for index, span in enumerate(spans):
            last = layout.last(span) + 1
            states = hidden[last - span.count : last] if span.hidden else None
            span.kv.wrote(span.count, span.content)
            row = place.get(index)
            chosen = None if row is None else tokens
            steps.append(Step(chosen, row or 0, states, scores.get(row)))
        self.pool.released()  # the sequences are idle now: calls of another node may want pages
        return steps

    def _forward(
        self,
        layout: Layout,
        kv_lens: list[int],
        tables: list[list[int]],
        sampled: list[Span],
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states of all tokens, and logits of the last token of each span in `sampled`."""
        pieces, positions = layout.pieces, layout.positions
        counted = not isinstance(positions, Tensor)
        inputs = self._inputs(pieces)
        fixed = counted or (self._fractions and positions.dim() == 1)
        if fixed and self._is_captured(pieces, sampled):
            hidden, logits = self.graphs.run(inputs, positions, kv_lens, tables)
            return (hidden.clone() if any(p.span.hidden for p in pieces) else hidden), logits
        batch = PagedBatch(
            layout.counts,
            kv_lens,
            tables,
            [piece.span.causal for piece in pieces],
            self.pool.page_size,
            layout.ends,
        )
        last = [layout.last(span) for span in sampled]
        numbers = positions if counted else (), batch.slot_list, last
        where, slots, wanted = pack(numbers, torch.int64, self.device)
        if not counted:
            flat = to_device(positions.flatten().numpy(), torch.float32, self.device)
            where = flat.view(positions.shape)
        context = PagedContext(self.pool, batch, slots)
        experts = (layout.lead,) if layout.lead else ()
        hidden = self.network(inputs, where, context, *experts)
        if not sampled:
            return hidden, None
        every = len(sampled) == len(hidden)
        return hidden, self.network.logits(hidden if every else hidden[wanted])

    def _decode(
        self, ids: Tensor, positions: Tensor, context: PagedContext
    ) -> tuple[Tensor, Tensor]:
        hidden = self.network(ids, positions, context)
        return hidden, self.network.logits(hidden)

    def _is_captured(self, pieces: list[Piece], sampled: list[Span]) -> bool:
        return (
            self.graphs is not None
            and len(sampled) == len(pieces)
            and all(p.count == 1 and not p.span.is_embedded for p in pieces)
            and self.graphs.fits(len(pieces), [p.span.kv.pages for p in pieces])
        )

    def _inputs(self, pieces: list[Piece]) -> Tensor:
        """Ids `[tokens]`, or embeddings `[tokens, hidden]` if any span brings some."""
        if not any(piece.span.is_embedded for piece in pieces):
            return self._ids(pieces)
        parts = [
            piece.inputs if piece.span.is_embedded else self.network.embed(self._ids([piece]))
            for piece in pieces
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _ids(self, pieces: list[Piece]) -> Tensor:
        """Ids `[tokens]`. Those that a step chose are not read on a GPU: they stay there."""
        ids: list[int] = []
        if self.device.type == "cpu":
            for piece in pieces:
                inputs = piece.inputs
                ids += (inputs.token,) if isinstance(inputs, Step) else inputs
            return to_device(ids, torch.int64, self.device)
        return gather_ids([piece.inputs for piece in pieces], self.device)


def _scores(logits: Tensor, samplers: Sequence[SamplerState]) -> dict[int, tuple[LogProbs, int]]:
    """Row -> its scores, for the rows whose parameters ask for them."""
    rows = [row for row, state in enumerate(samplers) if state.params.logprobs is not None]
    if not rows:
        return {}
    scores = LogProbs(logits[rows], [samplers[row].params.logprobs for row in rows])
    return {row: (scores, index) for index, row in enumerate(rows)}


class Generation:
    """Tokens being decoded. `finish_reason` is `"stop"` or `"length"` once it has ended.

    `scores` holds those of every token so far, where the parameters ask for them.
    """

    def __init__(
        self,
        lm: LanguageModel,
        kv: KVCache,
        prompt: Sequence[int],
        params: SamplingParams,
        usage: Usage | None,
        feed: Feed,
    ) -> None:
        self.finish_reason: str | None = None
        self.scores: list[TokenScores] = []
        self._lm = lm
        self._kv = kv
        self._prompt = prompt
        self._params = params
        self._usage = usage if usage is not None else Usage()
        self._feed = feed

    def __aiter__(self) -> AsyncIterator[int]:
        return self._tokens()

    async def _tokens(self) -> AsyncIterator[int]:
        lm, kv, params, usage = self._lm, self._kv, self._params, self._usage
        sampler = lm.sampler.open(params, self._prompt)
        try:
            step = await self._feed(sampler)
            for count in range(1, params.max_tokens + 1):
                more = count < params.max_tokens
                ahead = None
                if lm.look_ahead and more:
                    ahead = await lm(Span(kv, step, 1, sampler=sampler))
                token = step.token
                usage.generated_tokens += 1
                if token in params.stop_ids:
                    if ahead is not None:
                        kv.truncate(kv.length - 1)
                    self.finish_reason = "stop"
                    return
                if ahead is not None:
                    kv.note((token,))
                if params.logprobs is not None:
                    self.scores.append(step.scores)
                try:
                    yield token
                except GeneratorExit:  # nobody wants more, so the token stays out of the cache
                    if ahead is not None and not kv.closed:
                        kv.truncate(kv.length - 1)
                    raise
                if more:
                    step = ahead or await lm(Span(kv, step, 1, sampler=sampler, content=(token,)))
            self.finish_reason = "length"
        finally:
            lm.sampler.close(sampler)
