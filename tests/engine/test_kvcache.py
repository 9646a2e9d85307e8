from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from mstar.engine.kvcache import KVLayout, KVPool
from mstar.engine.pages import PagesExhausted
from mstar.errors import InvalidRequest

PAGE = 4


def pool_of(pages, **options):
    return KVPool(KVLayout(1, 1, 1), pages * PAGE, page_size=PAGE, **options)


def write(kv, tokens, busy=(), content=True):
    """What a network does: the key and value of a token depend on all tokens before it."""
    kv.reserve(len(tokens), {kv.group, *busy})
    history = read(kv)
    for offset, token in enumerate(tokens):
        value = hash((tuple(history), token)) % 1_000_003
        history.append(value)
        place = kv.length + offset
        page = kv.pages[place // PAGE]
        kv.pool.tensor[:, :, page, place % PAGE] = value
    kv.wrote(len(tokens), tokens if content else None)


def read(kv):
    """The values of a sequence, wherever they lie."""
    pages = kv.group._saved if kv.group.is_out else kv.pool.tensor
    return [int(pages[0, 0, kv.pages[i // PAGE], i % PAGE]) for i in range(kv.length)]


def values(tokens):
    history = []
    for token in tokens:
        history.append(hash((tuple(history), token)) % 1_000_003)
    return history


def used(pool):
    table = pool.table
    assert table.used + table.free + table.cached == table.count
    return table.used


def test_a_sequence_takes_pages_as_it_grows_and_gives_them_back():
    pool = pool_of(8)
    with pool.open() as kv:
        write(kv, [1, 2, 3])
        assert used(pool) == 1
        write(kv, [4, 5, 6])
        assert (used(pool), kv.length) == (2, 6)
        assert read(kv) == values([1, 2, 3, 4, 5, 6])
    assert used(pool) == 0
    assert not pool.groups
    kv.close()
    with pytest.raises(RuntimeError, match="was closed"):
        kv.reserve(1, set())


def test_forks_share_pages_until_one_writes():
    pool = pool_of(8)
    kv = pool.open()
    write(kv, range(6))
    fork = kv.fork()
    assert used(pool) == 2
    write(fork, [60])
    assert used(pool) == 3
    write(kv, [61, 62])
    assert used(pool) == 3
    assert read(kv) == values([*range(6), 61, 62])
    assert read(fork) == values([*range(6), 60])
    kv.close()
    assert read(fork) == values([*range(6), 60])
    fork.close()
    assert used(pool) == 0


def test_rolling_back_into_a_shared_page_does_not_change_the_other_sequence():
    pool = pool_of(8)
    kv = pool.open()
    write(kv, range(8))
    fork = kv.fork()
    kv.truncate(5)
    write(kv, [50, 51, 52, 53])
    assert read(fork) == values(range(8))
    assert read(kv) == values([0, 1, 2, 3, 4, 50, 51, 52, 53])


@pytest.mark.parametrize(("pages", "kept"), [(8, 8), (2, 4)])
def test_rolling_back_into_a_published_page_leaves_it_to_others_if_there_is_room(pages, kept):
    pool = pool_of(pages)
    kv = pool.open()
    write(kv, range(8))
    kv.truncate(6)
    write(kv, [60, 61])
    with pool.open() as other:
        assert other.reuse([*range(9)]) == kept
        assert read(other) == values(range(kept))
    with pool.open() as other:
        assert other.reuse([*range(6), 60, 61, 9]) == 8
        assert read(other) == values([*range(6), 60, 61])


def test_rolling_back_gives_pages_back_and_checks_its_argument():
    pool = pool_of(8)
    kv = pool.open()
    write(kv, range(9))
    kv.truncate(4)
    assert used(pool) == 1
    kv.truncate(0)
    assert used(pool) == 0
    with pytest.raises(ValueError, match="length=1: the sequence has 0 tokens"):
        kv.truncate(1)


def test_a_prefix_is_reused_in_whole_pages_but_never_the_whole_prompt():
    pool = pool_of(16)
    with pool.open() as kv:
        write(kv, range(8))
    with pool.open() as kv:
        assert kv.reuse(list(range(8))) == 4
        assert kv.cached_tokens == kv.length == 4
        write(kv, [4, 5, 6, 7])
        assert read(kv) == values(range(8))
    with pool.open() as kv:
        assert kv.reuse(list(range(9))) == 8
        assert read(kv) == values(range(8))
    with pool.open() as kv:
        assert kv.reuse([0, 1, 2, 3, 4, 5, 6, 99, 8]) == 4
    with pool.open() as kv:
        assert kv.reuse([99, *range(1, 9)]) == 0
    assert used(pool) == 0


def test_tokens_that_see_each_other_are_reused_together_or_not_at_all():
    pool = pool_of(32)
    with pool.open() as kv:
        write(kv, range(14))
    content = [*range(8), 90, 91, 92, 93]
    with pool.open() as kv:
        assert kv.reuse(content, [(6, 10)]) == 6
        assert read(kv) == values(range(6))
    with pool.open() as kv:
        assert kv.reuse(content, [(2, 8)]) == 8
    with pool.open() as kv:
        assert kv.reuse(content, [(0, 10)]) == 0
        assert kv.cached_tokens == 0
    assert used(pool) == 0


def test_a_sealed_end_is_found_by_others_and_stays_as_it_was():
    pool = pool_of(32)
    kv = pool.open()
    write(kv, range(10))
    kv.seal()
    kv.seal()
    write(kv, [70, 71, 72])
    kv.close()
    for tail in (80, 81):  # the first to come must not spoil it for the second
        content = [*range(10), tail, tail, tail]
        with pool.open() as other:
            assert other.reuse(content, [(2, 10)]) == 10
            write(other, [tail] * 3)
            assert read(other) == values(content)
    with pool.open() as other:
        assert other.reuse([*range(9), 99, 99], [(2, 10)]) == 2
    assert used(pool) == 0


def test_sealing_needs_a_page_and_content_that_is_known():
    pool = pool_of(3)
    with pool.open() as kv:
        write(kv, range(10))
        kv.seal()
        assert pool.table.available == 0
    pool = pool_of(8)
    with pool.open() as kv:
        kv.reserve(5, set())
        kv.wrote(5)
        kv.seal()
        assert pool.table.available == 6


def test_a_page_is_found_only_after_the_same_beginning():
    pool = pool_of(16)
    with pool.open() as kv:
        write(kv, [0, 0, 0, 0, 1, 1, 1, 1])
    with pool.open() as kv:
        assert kv.reuse([1, 1, 1, 1, 0]) == 0


def test_pages_of_a_live_sequence_can_be_reused_and_its_forks_keep_theirs():
    pool = pool_of(16)
    kv = pool.open()
    write(kv, range(10))
    other = pool.open()
    assert other.reuse(list(range(10))) == 8
    fork = other.fork()
    write(fork, [70])
    write(other, [80])
    assert used(pool) == 2 + 1 + 2
    kv.close()
    assert read(fork) == values([*range(8), 70])
    assert read(other) == values([*range(8), 80])


def test_pages_that_were_reserved_in_vain_do_not_mix_with_reused_ones():
    pool = pool_of(16)
    with pool.open() as kv:
        write(kv, range(8))
    kv = pool.open()
    kv.reserve(6, set())
    assert kv.reuse(list(range(9))) == 8
    assert read(kv) == values(range(8))
    assert used(pool) == 2


def test_tokens_of_unknown_content_end_what_others_can_find():
    pool = pool_of(16)
    kv = pool.open()
    write(kv, range(4))
    write(kv, [4, 5], content=False)
    write(kv, [6, 7, 8, 9])
    kv.note([8, 9])
    with pool.open() as other:
        assert other.reuse([*range(20)]) == 4
    kv.truncate(4)
    write(kv, [4, 5, 6, 7])
    with pool.open() as other:
        assert other.reuse([*range(20)]) == 8


def test_content_may_be_told_after_the_tokens_were_written():
    pool = pool_of(16)
    kv = pool.open()
    write(kv, range(3))
    write(kv, [3], content=False)
    kv.note([3])
    with pool.open() as other:
        assert other.reuse([*range(5)]) == 4


def test_a_sequence_that_begins_anew_publishes_what_it_is_now():
    pool = pool_of(16)
    with pool.open() as kv:
        write(kv, [1, 1, 1, 1, 2, 2, 2, 2])
        kv.truncate(0)
        write(kv, [3, 3, 3, 3, 2, 2, 2, 2])
    with pool.open() as kv:
        assert kv.reuse([1, 1, 1, 1, 2, 2, 2, 2, 9]) == 8
        assert read(kv) == values([1, 1, 1, 1, 2, 2, 2, 2])
    with pool.open() as kv:
        assert kv.reuse([3, 3, 3, 3, 2, 2, 2, 2, 9]) == 8
        assert read(kv) == values([3, 3, 3, 3, 2, 2, 2, 2])


def test_without_a_prefix_cache_nothing_is_kept():
    pool = pool_of(8, prefix_cache=False)
    with pool.open() as kv:
        write(kv, range(8))
    with pool.open() as kv:
        assert kv.reuse(list(range(9))) == 0
    assert pool.table.cached == 0


def test_the_tail_of_an_old_sequence_is_evicted_first():
    pool = pool_of(8)
    with pool.open() as kv:
        write(kv, range(16))
    with pool.open() as other:
        write(other, range(100, 122))
        with pool.open() as kv:
            assert kv.reuse(list(range(17))) == 8


def test_a_preempted_group_comes_back_bit_for_bit_with_its_forks():
    pool = pool_of(8)
    kv = pool.open()
    write(kv, range(6))
    fork = kv.fork()
    write(fork, [60, 61, 62])
    write(kv, [70])
    third = fork.fork()
    before = [read(s) for s in (kv, fork, third)]
    kv.group.swap_out()
    assert used(pool) == 0
    assert [read(s) for s in (kv, fork, third)] == before
    with pool.open() as other:
        write(other, range(100, 132))
        assert used(pool) == 8
    with pool.open() as other:
        assert other.reuse([*range(9)]) == 0
    write(third, [63])
    assert not kv.group.is_out
    with pool.open() as other:
        assert other.reuse([*range(9)]) == 4
    assert [read(s) for s in (kv, fork)] == before[:2]
    assert read(third) == [*before[2], *values([*range(6), 60, 61, 62, 63])[-1:]]
    for s in (kv, fork, third):
        s.close()
    assert used(pool) == 0


def test_what_is_rolled_back_or_closed_while_it_is_out_is_not_brought_back():
    pool = pool_of(8)
    kv = pool.open()
    write(kv, range(16))
    fork = kv.fork()
    write(fork, range(16, 24))
    kv.group.swap_out()
    late = kv.fork()
    fork.close()
    kv.truncate(4)
    late.truncate(9)
    write(kv, [90, 91])
    assert used(pool) == 3 + 1
    assert read(kv) == values([0, 1, 2, 3, 90, 91])
    assert read(late) == values(range(9))
    kv.close()
    late.close()
    assert used(pool) == 0


def test_a_group_that_is_out_can_be_closed():
    pool = pool_of(8)
    kv = pool.open()
    write(kv, range(16))
    kv.group.swap_out()
    kv.close()
    assert used(pool) == 0
    assert not pool.groups


def test_idle_groups_make_room_youngest_first_and_waiting_ones_only_for_their_elders():
    pool = pool_of(6)
    elder, middle, young = (pool.open() for _ in range(3))
    for kv in (elder, middle, young):
        write(kv, range(8), busy=pool.groups)
    write(elder, [8])
    assert (middle.group.is_out, young.group.is_out) == (False, True)
    middle.group.waiting = elder.group.waiting = 1
    with pytest.raises(PagesExhausted):
        young.reserve(1, set())
    elder.reserve(12, set())
    assert middle.group.is_out
    assert pool.preemptions == 2
    assert read(middle) == read(young) == values(range(8))


def test_a_request_that_never_fits_is_refused_with_the_numbers():
    pool = pool_of(8)
    pool.check_fits("max_tokens", 10, 32)
    with pytest.raises(InvalidRequest, match=r"33 tokens .*9 pages.* holds 32 \(8 pages of 4\)"):
        pool.check_fits("max_tokens", 11, 33)


class Sequences(RuleBasedStateMachine):
    """Anything that can be done with caches, against plain lists of tokens."""

    caches = Bundle("caches")
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9)

    @initialize(prefix_cache=st.booleans())
    def start(self, prefix_cache):
        self.pool = pool_of(10, prefix_cache=prefix_cache)
        self.model = {}

    @rule(target=caches, prompt=tokens)
    def open(self, prompt):
        kv = self.pool.open()
        cached = kv.reuse(prompt)
        assert cached % PAGE == 0
        assert cached < len(prompt)
        self.model[kv] = prompt[:cached]
        self.append(kv, prompt[cached:])
        return kv

    @rule(kv=caches, tokens=tokens)
    def append(self, kv, tokens, known=True):
        try:
            write(kv, tokens, content=known)
        except PagesExhausted:
            return
        self.model[kv] = self.model[kv] + tokens

    @rule(kv=caches, tokens=tokens)
    def append_unknown(self, kv, tokens):
        self.append(kv, tokens, known=False)

    @rule(kv=caches, tokens=tokens)
    def scribble(self, kv, tokens):
        """A span that is not kept, or a batch that failed."""
        try:
            kv.reserve(len(tokens), {kv.group})
        except PagesExhausted:
            return
        for place in range(kv.length, kv.length + len(tokens)):
            kv.pool.tensor[:, :, kv.pages[place // PAGE], place % PAGE] = -1

    @rule(target=caches, kv=caches)
    def fork(self, kv):
        if len(self.model) > 6:
            return multiple()
        other = kv.fork()
        self.model[other] = list(self.model[kv])
        return other

    @rule(kv=caches, share=st.floats(0, 1))
    def truncate(self, kv, share):
        length = int(share * kv.length)
        kv.truncate(length)
        self.model[kv] = self.model[kv][:length]

    @rule(kv=caches)
    def swap_out(self, kv):
        if kv.group.holds_pages():
            kv.group.swap_out()

    @rule(kv=caches)
    def begin_anew(self, kv):
        kv.truncate(0)
        prompt = [0, 0, 0, 0, 1, 1, 1, 1, 0]
        self.model[kv] = prompt[: kv.reuse(prompt)]

    @rule(kv=caches)
    def begin_anew_with_an_image(self, kv):
        kv.truncate(0)
        prompt = [0, 0, 0, 0, 1, 1, 1, 0, 0]
        self.model[kv] = prompt[: kv.reuse(prompt, [(1, 3), (3, 7)])]

    @rule(kv=caches)
    def seal(self, kv):
        kv.seal()

    @rule(kv=consumes(caches))
    def close(self, kv):
        kv.close()
        del self.model[kv]

    @invariant()
    def every_sequence_reads_what_was_written(self):
        for kv, tokens in getattr(self, "model", {}).items():
            assert read(kv) == values(tokens)

    @invariant()
    def every_page_is_held_as_often_as_it_is_used(self):
        if not hasattr(self, "pool"):
            return
        held = [0] * self.pool.table.count
        for kv in self.model:
            if not kv.group.is_out:
                for page in kv.pages:
                    held[page] += 1
        assert self.pool.table.references == held
        assert used(self.pool) == sum(count > 0 for count in held)

    def teardown(self):
        for kv in list(getattr(self, "model", {})):
            self.close(kv)
        if hasattr(self, "pool"):
            assert used(self.pool) == 0
            assert not self.pool.groups


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_pages_hold_the_dtype_and_shape_of_the_layout():
    layout = KVLayout(layers=3, kv_heads=2, head_dim=8)
    pool = KVPool(layout, 9, page_size=4, dtype=torch.bfloat16)
    assert pool.tensor.shape == (3, 2, 3, 4, 2, 8)
    assert pool.capacity == 12
    assert layout.bytes_per_token(torch.bfloat16) == 3 * 2 * 2 * 8 * 2
    keys, values = pool.layer(1)
    keys.fill_(1)
    values.fill_(2)
    assert pool.tensor[1].float().mean() == 1.5
