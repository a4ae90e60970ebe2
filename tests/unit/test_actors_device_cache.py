"""What is kept, shared and evicted; the ranks' tables follow from the operations alone."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from actors.device_cache import MIN_SHARED_TOKENS, DeviceCache, Match
from actors.messages import TokenIds
from attention import Zigzag
from models.page_table import PageTable, Span

PAGE, RANKS = 4, 2


def ids(*tokens: int) -> TokenIds:
    return np.asarray(tokens, dtype=np.int32)


def sharded(start: int, count: int) -> list[list[Span]]:
    """Return the spans of new tokens cut over the ranks."""
    zigzag = Zigzag(num_tokens=count, num_ranks=RANKS)
    return [
        [(start + a, b - a) for a, b in map(zigzag.bounds, zigzag.chunks(rank))]
        for rank in range(RANKS)
    ]


def run_to_end(cache: DeviceCache, sequence_id: int, tokens: TokenIds, salt: str = "") -> int:
    """Prefill a prompt and end; return how many tokens were shared."""
    match = cache.match(salt, tokens)
    final_rows = [len(tokens)] * RANKS
    assert cache.fits(final_rows, match)
    cache.begin(sequence_id, salt, match, final_rows)
    cache.grow(sequence_id, sharded(match.tokens, len(tokens) - match.tokens))
    cache.accept(sequence_id, tokens)
    cache.finish(sequence_id)
    cache.check_invariants()
    return match.tokens


def make_cache(num_pages: int = 64, **options: bool) -> DeviceCache:
    return DeviceCache(num_ranks=RANKS, num_pages=num_pages, page_tokens=PAGE, **options)


def test_next_turn_shares_all_before_it() -> None:
    """A turn costs its new tokens; an identical prompt costs one."""
    cache, document = make_cache(), np.arange(40, dtype=np.int32)
    run_to_end(cache, 1, document)

    assert run_to_end(cache, 2, np.append(document, ids(7, 8, 9))) == 40
    assert run_to_end(cache, 3, document) == 39
    assert cache.num_kept == 1  # the longest holds what the others had


def test_forks_share_the_pages_of_their_document() -> None:
    """Two branches of one document hold its full pages once."""
    cache, document = make_cache(), np.arange(32, dtype=np.int32)
    run_to_end(cache, 1, np.append(document, np.full(8, 50, dtype=np.int32)))
    free_before = [table.num_free_pages for table in cache._tables]

    run_to_end(cache, 2, np.append(document, np.full(8, 60, dtype=np.int32)))

    assert cache.num_kept == 2
    for before, table in zip(free_before, cache._tables, strict=True):
        assert before - table.num_free_pages <= 2  # of the 5 that a rank's 20 rows take


@pytest.mark.parametrize("length", [2, 10, MIN_SHARED_TOKENS + 5])
def test_identical_prompt_leaves_one_token(length: int) -> None:
    """However short: all but the last token is shared."""
    cache, prompt = make_cache(), np.arange(length, dtype=np.int32)
    run_to_end(cache, 1, prompt)

    assert cache.match("", prompt).tokens == length - 1


def test_next_turn_of_a_short_conversation_shares_it() -> None:
    """A first turn of five tokens is worth as much as its second one needs."""
    cache = make_cache()
    run_to_end(cache, 1, ids(1, 5, 6, 7, 8))

    assert cache.match("", ids(1, 5, 6, 7, 8, 9, 10)) == Match(5, 1)


def test_a_common_bos_alone_is_not_shared() -> None:
    """Every prompt begins with it; a fork for one row would cost more than the row."""
    cache = make_cache()
    run_to_end(cache, 1, ids(1, *range(10, 50)))

    assert cache.match("", ids(1, *range(60, 90))) == Match()


def test_two_tenants_share_nothing() -> None:
    """The same prompt under another salt is computed anew, and lies in pages of its own."""
    cache, prompt = make_cache(), np.arange(30, dtype=np.int32)
    run_to_end(cache, 1, prompt, salt="a")

    assert cache.match("b", prompt) == Match()
    run_to_end(cache, 2, prompt, salt="b")
    for table in cache._tables:
        assert not set(table.run(1).page_ids) & set(table.run(2).page_ids)


def test_longest_unused_goes_first_and_only_as_much_as_needed() -> None:
    """Of the oldest the tail goes, the rest can still be shared."""
    cache = make_cache(num_pages=16)  # 128 rows in all
    old, new = np.arange(48, dtype=np.int32), np.arange(100, 148, dtype=np.int32)
    run_to_end(cache, 1, old)
    run_to_end(cache, 2, new)

    run_to_end(cache, 3, np.arange(200, 240, dtype=np.int32))

    assert cache.match("", new).tokens == 47
    assert 0 < cache.match("", old).tokens < 47


def test_what_runs_is_never_evicted() -> None:
    """A sequence that cannot run beside others to its end has to wait."""
    cache = make_cache(num_pages=8)
    cache.begin(1, "", Match(), [16, 16])
    cache.grow(1, sharded(0, 8))

    assert not cache.fits([20, 20], Match())
    assert cache.fits([16, 16], Match())


def test_clear_gives_up_all_that_is_kept() -> None:
    """Running sequences go on, and end without being kept."""
    cache = make_cache()
    run_to_end(cache, 1, np.arange(30, dtype=np.int32))
    cache.begin(2, "", cache.match("", np.arange(40, dtype=np.int32)), [40, 40])

    cache.clear()

    assert cache.match("", np.arange(30, dtype=np.int32)) == Match()
    cache.check_invariants()
    cache.finish(2)
    cache.check_invariants()
    assert all(table.num_free_pages == table.num_pages for table in cache._tables)


def test_without_sharing_nothing_is_kept() -> None:
    """`enable_prefix_caching=false`: all pages are free when an answer ends."""
    cache = make_cache(shares=False)
    run_to_end(cache, 1, np.arange(30, dtype=np.int32))

    assert cache.match("", np.arange(30, dtype=np.int32)) == Match()
    assert all(table.num_free_pages == table.num_pages for table in cache._tables)


class CacheMachine(RuleBasedStateMachine):
    """Random conversations in a small pool; ranks that execute the operations agree."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache(num_pages=14)
        self.ranks = [PageTable(num_pages=14, page_tokens=PAGE) for _ in range(RANKS)]
        self.tokens: dict[int, TokenIds] = {}
        self.computed: dict[int, int] = {}
        self.finals: dict[int, int] = {}
        self.numbers = 0

    @rule(
        salt=st.sampled_from(["a", "b"]),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        more=st.integers(0, 20),
    )
    def begin(self, salt: str, prompt: list[int], more: int) -> None:
        tokens = np.repeat(ids(*prompt), 2)
        match = self.cache.match(salt, tokens)
        share = (len(tokens) + more) // RANKS + 8
        final_rows = [
            max(share, rows + share) for rows in self.cache.rows(match.source_id, match.tokens)
        ]
        if not self.cache.fits(final_rows, match):
            return
        self.numbers += 1
        self.cache.begin(self.numbers, salt, match, final_rows)
        self.cache.grow(self.numbers, sharded(match.tokens, len(tokens) - match.tokens))
        self.tokens[self.numbers] = tokens
        self.finals[self.numbers] = len(tokens) + more
        self.cache.accept(self.numbers, tokens)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.integers(1, 6), accepted=st.integers(0, 6))
    def decode(self, data: st.DataObject, count: int, accepted: int) -> None:
        each = data.draw(st.sampled_from(sorted(self.tokens)))
        count = min(count, self.finals[each] - len(self.tokens[each]))
        if count <= 0:
            return
        position = len(self.tokens[each])
        owner = self.cache.rows(each, position).index(min(self.cache.rows(each, position)))
        self.cache.grow(each, [[(position, count)] if rank == owner else [] for rank in range(2)])
        accepted = min(accepted, count)
        self.tokens[each] = np.append(self.tokens[each], ids(*[5] * accepted))
        self.cache.accept(each, self.tokens[each])
        self.cache.truncate(each, len(self.tokens[each]))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(sorted(self.tokens)))
        self.cache.finish(each)
        del self.tokens[each]

    @rule()
    def clear(self) -> None:
        self.cache.clear()

    @invariant()
    def ranks_agree(self) -> None:
        self.cache.check_invariants()
        for op in self.cache.take_ops():
            for rank, table in enumerate(self.ranks):
                table.apply(op, rank)
        for ours, theirs in zip(self.cache._tables, self.ranks, strict=True):
            assert ours._runs == theirs._runs
            assert sorted(ours._free) == sorted(theirs._free)

    def teardown(self) -> None:
        for each in list(self.tokens):
            self.cache.finish(each)
        self.cache.clear()
        assert all(table.num_free_pages == table.num_pages for table in self.cache._tables)


def test_pages_are_free_or_kept_whatever_comes() -> None:
    """And all are free once everything has ended and the cache is cleared."""
    run_state_machine_as_test(
        CacheMachine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )
