"""The paged KV cache: tensors in pages, sequences that hold pages, and what happens when they end.

PagedAttention, Kwon et al. 2023, section 4: a sequence's keys and values live in fixed-size pages
that need not be neighbours, so sequences grow without copying and share what they have in common.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mstar.engine.pages import PagesExhausted, PageTable
from mstar.errors import InvalidRequest

__all__ = ["KVCache", "KVGroup", "KVLayout", "KVPool"]


@dataclass(frozen=True)
class KVLayout:
    """What one token of a network keeps: `layers` x 2 x `kv_heads` x `head_dim` numbers."""

    layers: int
    kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Size of one token's keys and values."""
        return self.layers * 2 * self.kv_heads * self.head_dim * dtype.itemsize


class KVPool:
    """The pages of one network.

    `tensor` is `[layers, 2, pages, page_size, kv_heads, head_dim]`, keys before values.

    Args:
        tokens: capacity; rounded up to whole pages.
        prefix_cache: keep the pages of finished sequences for others with the same beginning.
    """

    def __init__(
        self,
        layout: KVLayout,
        tokens: int,
        *,
        page_size: int = 16,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        prefix_cache: bool = True,
    ) -> None:
        pages = -(-tokens // page_size)
        self.layout = layout
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.table = PageTable(pages, None if prefix_cache else 0)
        self.tensor = torch.empty(
            (layout.layers, 2, pages, page_size, layout.kv_heads, layout.head_dim),
            device=device,
            dtype=dtype,
        )
        # Pages are read whole by some kernels and masked afterwards; garbage could be NaN.
        if self.tensor.is_cuda:
            self.tensor.zero_()
        self._layers = [tuple(both.unbind()) for both in self.tensor]
        self.groups: dict[KVGroup, None] = {}
        self.preemptions = 0
        self.on_release: list[Any] = []
        self._ages = itertools.count()

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.table.count * self.page_size

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Key and value pages of one layer, each `[pages, page_size, kv_heads, head_dim]`."""
        return self._layers[index]

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def check_fits(
        self, field: str, value: Any, tokens: int, error: type[InvalidRequest] = InvalidRequest
    ) -> None:
        """Refuse a request that could never get the pages it may need.

        Raises:
            error: names `field` and says how much there is.
        """
        if tokens > self.capacity:
            raise error(
                field,
                value,
                f"the request may need {tokens} tokens of KV cache ({self.pages_for(tokens)} pages)"
                f" and the cache holds {self.capacity} ({self.table.count} pages of "
                f"{self.page_size})",
            )

    def open(self) -> KVCache:
        """An empty sequence, in a group of its own."""
        group = KVGroup(self, next(self._ages))
        self.groups[group] = None
        return group.add(KVCache(group))

    def released(self) -> None:
        """Pages were given back or a group went idle: whoever waits for pages may try again."""
        for notify in self.on_release:
            notify()

    def obtain(
        self, count: int, for_group: KVGroup, busy: set[KVGroup], after: int | None
    ) -> list[int]:
        """Allocate pages, preempting other groups if it must be.

        Groups in `busy` are part of the batch that is being formed and stay. Of the others, idle
        ones may be preempted by anyone, waiting ones by their elders. So the eldest waiting group
        always gets its pages, and there is no deadlock as long as it fits alone.

        Raises:
            PagesExhausted: not now.
        """
        while count > self.table.available:
            victim = self._victim(for_group, busy)
            if victim is None:
                raise PagesExhausted(f"{count} pages wanted, {self.table.available} left")
            victim.swap_out()
            self.preemptions += 1
        return self.table.allocate(count, after)

    def is_alone(self, group: KVGroup) -> bool:
        """Whether no other group holds pages, so that waiting for some is in vain."""
        return not any(g.holds_pages() for g in self.groups if g is not group)

    def _victim(self, elder: KVGroup, busy: set[KVGroup]) -> KVGroup | None:
        candidates = [
            g
            for g in self.groups
            if g is not elder
            and g not in busy
            and g.holds_pages()
            and (g.waiting == 0 or g.age > elder.age)
        ]
        return max(candidates, key=lambda g: g.age, default=None)


class KVGroup:
    """A sequence and its forks: what is preempted and brought back as one.

    A preempted group's keys and values wait in host memory, so that it goes on exactly where it
    was, with the same bits.
    """

    def __init__(self, pool: KVPool, age: int) -> None:
        self.pool = pool
        self.age = age
        self.waiting = 0
        self.caches: dict[KVCache, None] = {}
        self._saved: Tensor | None = None

    def add(self, cache: KVCache) -> KVCache:
        """Make `cache` a member."""
        self.caches[cache] = None
        return cache

    def remove(self, cache: KVCache) -> None:
        """A member was closed; the last one takes the group along."""
        del self.caches[cache]
        if not self.caches:
            self.pool.groups.pop(self, None)
            self._saved = None

    @property
    def is_out(self) -> bool:
        """Whether the group was preempted and waits in host memory."""
        return self._saved is not None

    def holds_pages(self) -> bool:
        """Whether preempting it would free anything."""
        return not self.is_out and any(cache.pages for cache in self.caches)

    def swap_out(self) -> None:
        """Copy all pages to host memory and give them back; drafts are not worth it."""
        for cache in self.caches:
            surplus = cache.pages[self.pool.pages_for(cache.length) :]
            del cache.pages[len(cache.pages) - len(surplus) :]
            self.pool.table.release(reversed(surplus))
        pages = self._pages()
        place = {page: index for index, page in enumerate(pages)}
        self._saved = self.pool.tensor[:, :, pages].to("cpu")
        for cache in self.caches:
            self.pool.table.release(reversed(cache.pages))
            cache.pages = [place[page] for page in cache.pages]

    def swap_in(self, busy: set[KVGroup]) -> None:
        """Get pages again and copy everything back.

        Raises:
            PagesExhausted: not now; the group stays out.
        """
        if self._saved is None:
            return
        places = self._pages()
        fresh = self.pool.obtain(len(places), self, busy, None)
        self.pool.tensor[:, :, fresh] = self._saved[:, :, places].to(self.pool.tensor.device)
        self._saved = None
        page_at = dict(zip(places, fresh, strict=True))
        for cache in self.caches:
            cache.pages = [page_at[place] for place in cache.pages]
            self.pool.table.retain(cache.pages)
            for page, digest in zip(cache.pages, cache._digests, strict=False):
                self.pool.table.publish(page, digest)
        self.pool.table.release(fresh)

    def _pages(self) -> list[int]:
        return sorted({page for cache in self.caches for page in cache.pages})


class KVCache:
    """The cached tokens of one sequence. A context manager: leaving it gives the pages back.

    `length` counts the tokens that are in the cache. `cached_tokens` of them were found in the
    prefix cache when the sequence began. `offset` is what the rotary position of the next token is
    beyond `length`: walks set it where media take fewer positions than tokens; fractions are fine.
    """

    def __init__(self, group: KVGroup) -> None:
        self.group = group
        self.pool = group.pool
        self.pages: list[int] = []
        self.length = 0
        self.cached_tokens = 0
        self.offset: float = 0
        self.closed = False
        self._content: list[int] = []  # of the first tokens, as far as it is known without a gap
        self._digests: list[bytes] = []  # of the first pages

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all pages back."""
        if self.closed:
            return
        self.closed = True
        if not self.group.is_out:
            self.pool.table.release(reversed(self.pages))
        self.pages = []
        self.group.remove(self)
        self.pool.released()

    def fork(self) -> KVCache:
        """A second sequence with the same beginning. Pages are shared until one of both writes."""
        self._check_open()
        other = KVCache(self.group)
        other.pages = self.pages[: self.pool.pages_for(self.length)]
        if not self.group.is_out:
            self.pool.table.retain(other.pages)
        other.length = self.length
        other.offset = self.offset
        other._content = list(self._content)
        other._digests = list(self._digests)
        return self.group.add(other)

    def truncate(self, length: int) -> None:
        """Roll back to the first `length` tokens."""
        self._check_open()
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length}: the sequence has {self.length} tokens")
        self.length = length
        keep = self.pool.pages_for(length)
        surplus = self.pages[keep:]
        self.pages = self.pages[:keep]
        if surplus and not self.group.is_out:
            self.pool.table.release(reversed(surplus))
            self.pool.released()
        del self._content[length:]
        del self._digests[length // self.pool.page_size :]

    def reuse(
        self,
        content: Sequence[int],
        whole: Sequence[tuple[int, int]] = (),
        most: int | None = None,
    ) -> int:
        """Begin an empty sequence with pages that others left, if they hold the same content.

        Args:
            content: one integer for each token to come: its id, or for a token of an image or a
                sound a hash of the media's bytes and the token's place in it.
            whole: first and last + 1 of tokens that see each other, so that they can only be reused
                together. Others left their end by `seal`.
            most: reuse no more than so many tokens.

        Returns:
            How many tokens need not be computed, at most `len(content) - 1`: whole pages, or up to
            the end of one of `whole`.
        """
        self._check_open()
        if self.length or not self.pool.prefix_cache or self.group.is_out:
            return 0
        self.truncate(0)  # of pages that were reserved in vain
        size = self.pool.page_size
        digest = b""
        last = len(content) - 1 if most is None else min(most, len(content) - 1)
        for start in range(0, last - size + 1, size):
            digest = _extend_digest(digest, content[start : start + size])
            page = self.pool.table.find(digest)
            if page is None:
                break
            self.pool.table.retain([page])
            self.pages.append(page)
            self._digests.append(digest)
        self.length = len(self.pages) * size
        for _, end in reversed(whole):
            if self.length < end < min(self.length + size, last + 1):
                self._adopt(content, end)
                if self.length == end:
                    break
        self._content = list(content[: self.length])
        for start, end in whole:
            if start < self.length < end:
                self.truncate(start)
        self.cached_tokens = self.length
        return self.length

    def seal(self) -> None:
        """Let others find the sequence up to here, though its last page is not full.

        That takes a copy of the page; without a page for it, nothing happens.
        """
        size, table = self.pool.page_size, self.pool.table
        full, rest = divmod(self.length, size)
        known = len(self._content) == self.length and len(self._digests) == full
        if not rest or not known or self.group.is_out or not table.available:
            return
        before = self._digests[-1] if self._digests else b""
        digest = _extend_digest(before, self._content[full * size :])
        if table.find(digest) is not None:
            return
        (page,) = table.allocate(1)
        self.pool.tensor[:, :, page] = self.pool.tensor[:, :, self.pages[full]]
        table.publish(page, digest)
        table.release([page])

    def _adopt(self, content: Sequence[int], end: int) -> None:
        """Take the sealed page that ends with token `end`, if there is one."""
        before = self._digests[-1] if self._digests else b""
        digest = _extend_digest(before, content[len(self.pages) * self.pool.page_size : end])
        page = self.pool.table.find(digest)
        if page is not None:
            self.pool.table.retain([page])
            self.pages.append(page)
            self.length = end

    def reserve(self, tokens: int, busy: set[KVGroup]) -> None:
        """Make sure that the next `tokens` can be written: bring the group back, get pages, copy
        the last page if others share it.

        Raises:
            PagesExhausted: not now. What was got so far is kept.
        """
        self._check_open()
        self.group.swap_in(busy)
        size = self.pool.page_size
        first = self.length // size
        if self.length % size and first < len(self.pages):
            self._make_own(first, busy)
        missing = self.pool.pages_for(self.length + tokens) - len(self.pages)
        if missing > 0:
            after = self.pages[-1] if self.pages else None
            self.pages += self.pool.obtain(missing, self.group, busy, after)

    def wrote(self, tokens: int, content: Sequence[int] | None = None) -> None:
        """The next `tokens` are in the pages now.

        Args:
            content: what they are (see `reuse`), so that others can find full pages. None: unknown,
                unless `note` says it before the next tokens.
        """
        self.length += tokens
        if content is not None:
            self.note(content)

    def note(self, content: Sequence[int]) -> None:
        """Say what the last tokens are. Of no use if there are others of unknown content."""
        if self.pool.prefix_cache and len(self._content) + len(content) == self.length:
            self._content += content
            self.publish()

    def publish(self) -> None:
        """Let others find the full pages whose content is known."""
        if self.group.is_out:
            return
        content, size = self._content, self.pool.page_size
        for index in range(len(self._digests), len(content) // size):
            before = self._digests[-1] if self._digests else b""
            self._digests.append(_extend_digest(before, content[index * size : (index + 1) * size]))
            self.pool.table.publish(self.pages[index], self._digests[index])

    def _make_own(self, index: int, busy: set[KVGroup]) -> None:
        """Copy on write: before writing into a page that somebody else holds or may find."""
        table, page = self.pool.table, self.pages[index]
        if table.references[page] == 1 and not (table.is_published(page) and table.available):
            table.unpublish(page)
            return
        after = self.pages[index - 1] if index else None
        (fresh,) = self.pool.obtain(1, self.group, busy, after)
        page = self.pages[index]
        self.pool.tensor[:, :, fresh] = self.pool.tensor[:, :, page]
        self.pages[index] = fresh
        table.release([page])

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the KV cache of this sequence was closed")


def _extend_digest(before: bytes, content: Sequence[int]) -> bytes:
    page = np.asarray(content, dtype=np.int64)
    return hashlib.blake2b(before + page.tobytes(), digest_size=16).digest()
