"""Accounting of the pages of a KV cache: who holds which, which are free, which are worth keeping.

A page is *held* while its reference count is above zero. A page whose content has been published
under a digest stays *cached* when nobody holds it any more, and is taken back, least recently used
first, when free pages run out. This file knows page numbers only; the tensors are in `kvcache.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

__all__ = ["PageTable", "PagesExhausted"]


class PagesExhausted(Exception):
    """There are not that many pages to be had now."""


class PageTable:
    """Reference counts, free pages and published pages of one pool.

    Pages are handed out next to each other where possible: a sequence whose pages are consecutive
    can be read without gathering.

    Args:
        count: number of pages.
        keep: most pages that are kept cached while nobody holds them (default: half of them).
    """

    def __init__(self, count: int, keep: int | None = None) -> None:
        if count < 1:
            raise ValueError(f"count={count}: a pool needs at least one page")
        self.count = count
        self.keep = count // 2 if keep is None else keep
        self.references = [0] * count
        self.hits = 0
        self.evictions = 0
        self._free = bytearray(b"\x01") * count
        self._num_free = count
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return self._num_free

    @property
    def cached(self) -> int:
        """Pages that nobody holds, kept for their content."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that `allocate` can give."""
        return self._num_free + len(self._cached)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.count - self.available

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take `count` pages, if possible those that follow page `after`.

        Raises:
            PagesExhausted: fewer are available; none is taken then.
        """
        if count > self.available:
            raise PagesExhausted(f"{count} pages wanted, {self.available} of {self.count} left")
        while self._num_free < count:
            self._evict()
        pages: list[int] = []
        page = self.count if after is None else after + 1
        while len(pages) < count:
            if page >= self.count or not self._free[page]:
                page = self._start_of_run(count - len(pages))
            self._free[page] = 0
            self._num_free -= 1
            self.references[page] = 1
            pages.append(page)
            page += 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Hold pages once more."""
        for page in pages:
            if self.references[page] == 0:
                del self._cached[page]
            self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Hold pages once less. What is published stays cached, the rest is free."""
        for page in pages:
            self.references[page] -= 1
            if self.references[page]:
                continue
            if page in self._digest_of:
                self._cached[page] = None
                if len(self._cached) > self.keep:
                    self._evict()
            else:
                self._free[page] = 1
                self._num_free += 1

    def publish(self, page: int, digest: bytes) -> None:
        """Make a held page findable by the digest of all that led to its content."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def unpublish(self, page: int) -> None:
        """Forget the digest of a page, because its content is about to change."""
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]

    def is_published(self, page: int) -> bool:
        """Whether others can find a page by its digest."""
        return page in self._digest_of

    def find(self, digest: bytes) -> int | None:
        """The page published under `digest`. Hold it before anything else is allocated."""
        page = self._page_of.get(digest)
        if page is not None:
            self.hits += 1
        return page

    def _evict(self) -> None:
        page, _ = self._cached.popitem(last=False)
        self.unpublish(page)
        self._free[page] = 1
        self._num_free += 1
        self.evictions += 1

    def _start_of_run(self, count: int = 1) -> int:
        """A free page with free room behind it: the middle of the longest free run if that
        leaves room for both neighbours to grow, else its start."""
        if self._num_free == self.count:
            return 0
        start, length = max(_runs(self._free), key=lambda run: run[1])
        return start + length // 2 if length >= 4 * count else start


def _runs(free: bytearray) -> Iterable[tuple[int, int]]:
    """The (start, length) of every run of ones."""
    start = free.find(1)
    while start >= 0:
        end = free.find(0, start)
        end = len(free) if end < 0 else end
        yield start, end - start
        start = free.find(1, end)
