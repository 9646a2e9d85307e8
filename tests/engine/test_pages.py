from __future__ import annotations

import pytest

from mstar.engine.pages import PagesExhausted, PageTable


def counts(table):
    assert table.used + table.free + table.cached == table.count
    return table.used, table.free, table.cached


def test_pages_are_held_until_everyone_gave_them_back():
    table = PageTable(8)
    pages = table.allocate(3)
    table.retain(pages[:2])
    assert counts(table) == (3, 5, 0)
    table.release(pages)
    assert counts(table) == (2, 6, 0)
    table.release(pages[:2])
    assert counts(table) == (0, 8, 0)


def test_pages_of_one_sequence_are_neighbours_where_possible():
    table = PageTable(32)
    first = table.allocate(2)
    second = table.allocate(2)
    grown = [*first, *table.allocate(1, after=first[-1])]
    assert grown == list(range(grown[0], grown[0] + 3))
    more = [*second, *table.allocate(2, after=second[-1])]
    assert more == list(range(more[0], more[0] + 4))


def test_asking_for_more_than_there_is_takes_nothing():
    table = PageTable(4)
    held = table.allocate(3)
    with pytest.raises(PagesExhausted, match="2 pages wanted, 1 of 4 left"):
        table.allocate(2)
    assert counts(table) == (3, 1, 0)
    assert table.allocate(1) == [page for page in range(4) if page not in held]
    assert table.allocate(0) == []


def test_a_published_page_is_found_until_its_content_changes():
    table = PageTable(4)
    (page,) = table.allocate(1)
    table.publish(page, b"a")
    assert table.find(b"a") == page
    table.unpublish(page)
    assert table.find(b"a") is None
    table.release([page])
    assert counts(table) == (0, 4, 0)


def test_the_first_page_published_under_a_digest_stays():
    table = PageTable(4)
    one, two = table.allocate(2)
    table.publish(one, b"a")
    table.publish(two, b"a")
    assert table.find(b"a") == one
    table.release([two])
    assert counts(table) == (1, 3, 0)


def test_cached_pages_are_evicted_least_recently_used_first():
    table = PageTable(4, keep=4)
    pages = table.allocate(4)
    for page in pages:
        table.publish(page, bytes([page]))
    table.release(reversed(pages))  # as a sequence does: its tail is the first to go
    table.retain([pages[3]])
    table.release([pages[3]])
    assert counts(table) == (0, 0, 4)
    assert sorted(table.allocate(2)) == pages[1:3]
    assert [table.find(bytes([page])) is not None for page in pages] == [True, False, False, True]


def test_at_most_keep_pages_stay_cached():
    table = PageTable(8, keep=2)
    pages = table.allocate(4)
    for page in pages:
        table.publish(page, bytes([page]))
    table.release(reversed(pages))
    assert counts(table) == (0, 6, 2)
    assert [table.find(bytes([page])) is not None for page in pages] == [True, True, False, False]


def test_a_cached_page_can_be_held_again():
    table = PageTable(2)
    (page,) = table.allocate(1)
    table.publish(page, b"a")
    table.release([page])
    assert counts(table) == (0, 1, 1)
    table.retain([table.find(b"a")])
    assert counts(table) == (1, 1, 0)
    assert table.hits == 1


def test_a_pool_has_at_least_one_page():
    with pytest.raises(ValueError, match="count=0"):
        PageTable(0)
