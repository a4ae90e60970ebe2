"""The page pool keeps every sequence's keys apart, whatever comes and goes."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from models.page_pool import PagePool
from tests.reference import random_qkv, softmax_attention

LAYERS, PAGES, PAGE = 2, 6, 4
sequence_ids = st.integers(0, 3)


def make_pool(num_pages: int = PAGES) -> PagePool:
    return PagePool(
        num_layers=LAYERS,
        num_pages=num_pages,
        page_tokens=PAGE,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def random_kv(num_rows: int, seed: int) -> list[Tensor]:
    """Return the keys' and values' heads of some rows, for each layer."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(num_rows, 4, 8, generator=rng) for _ in range(LAYERS)]


def append(pool: PagePool, sequence_id: int, kv: list[Tensor]) -> None:
    """Grow a run and store its new rows, as a step does."""
    first_row = pool.grow(sequence_id, len(kv[0]))
    for layer, kv_TJD in enumerate(kv):
        pool.store(layer, sequence_id, first_row, kv_TJD)


class PagePoolMachine(RuleBasedStateMachine):
    """The pool against a dict that keeps every sequence's rows in a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool()
        self.rows: dict[int, list[Tensor]] = {}
        self.draws = 0

    def pages_of(self, num_rows: int) -> int:
        return (num_rows + PAGE - 1) // PAGE

    def num_rows(self, sequence_id: int) -> int:
        return len(self.rows[sequence_id][0]) if sequence_id in self.rows else 0

    @rule(sequence_id=sequence_ids, count=st.integers(0, 11))
    def grow(self, sequence_id: int, count: int) -> None:
        self.draws += 1
        kv, before = random_kv(count, self.draws), self.num_rows(sequence_id)
        needed = self.pages_of(before + count) - self.pages_of(before)
        free = self.pool.num_free_pages
        if needed > free:
            with pytest.raises(MemoryError, match=f"{needed} KV pages needed, {free} of {PAGES}"):
                self.pool.grow(sequence_id, count)
            assert self.pool.num_free_pages == free
            assert self.pool.run(sequence_id).num_rows == before
            return
        append(self.pool, sequence_id, kv)
        old = self.rows.get(sequence_id, random_kv(0, 0))
        self.rows[sequence_id] = [torch.cat(pair) for pair in zip(old, kv, strict=True)]

    @rule(sequence_id=sequence_ids)
    def release(self, sequence_id: int) -> None:
        self.pool.release(sequence_id)
        self.rows.pop(sequence_id, None)

    @precondition(lambda self: self.rows)
    @rule(sequence_id=sequence_ids, layer=st.integers(0, LAYERS - 1), queries=st.integers(1, 3))
    def attend(self, sequence_id: int, layer: int, queries: int) -> None:
        q_THD, _, _ = random_qkv(queries, 1, head_dim=8)
        out, lse = self.pool.attend(layer, sequence_id, q_THD)
        k_SKD, v_SKD = self.rows.get(sequence_id, random_kv(0, 0))[layer].chunk(2, dim=1)
        expected_out, expected_lse = softmax_attention(q_THD, k_SKD, v_SKD)
        torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-6)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        self.pool.check_invariants()
        held = sum(self.pages_of(len(kv[0])) for kv in self.rows.values())
        assert self.pool.num_free_pages == PAGES - held

    def teardown(self) -> None:
        for sequence_id in self.rows:
            self.pool.release(sequence_id)
        assert self.pool.num_free_pages == PAGES
        self.pool.check_invariants()


def test_any_series_of_steps_keeps_rows_and_leaks_no_page() -> None:
    """Sequences come, grow, are refused and go in any order."""
    run_state_machine_as_test(
        PagePoolMachine, settings=settings(deadline=None, max_examples=40, stateful_step_count=25)
    )


def test_growth_returns_the_first_new_row() -> None:
    """The caller stores there; a step that adds no row gets where the next one would be."""
    pool = make_pool()

    assert [pool.grow(7, count) for count in (3, 0, 1, 5)] == [0, 3, 3, 4]
    assert pool.run(7).num_rows == 9
    assert len(pool.run(7).page_ids) == 3


def test_pages_are_taken_lowest_first() -> None:
    """Neighbouring pages are one kernel call, so a freed low page is used before a high one."""
    pool = make_pool()
    for sequence_id in range(3):
        pool.grow(sequence_id, PAGE)
    pool.release(1)
    pool.release(0)

    pool.grow(3, 3 * PAGE)

    assert pool.run(3).page_ids == [0, 1, 3]


def test_refused_growth_changes_nothing() -> None:
    """The caller may free other sequences and try again, or refuse the request."""
    pool = make_pool()
    kv = random_kv(9, 0)
    append(pool, 0, kv)
    q_THD, _, _ = random_qkv(1, 1, head_dim=8)
    before = pool.attend(0, 0, q_THD)

    with pytest.raises(MemoryError, match="4 KV pages needed, 3 of 6 free"):
        pool.grow(0, 16)

    pool.check_invariants()
    assert pool.num_free_pages == 3
    assert torch.equal(pool.attend(0, 0, q_THD)[0], before[0])
    append(pool, 1, random_kv(12, 1))
    assert pool.num_free_pages == 0


def test_pool_can_be_filled_to_the_last_row() -> None:
    """The promised max_model_len is computed from the pages: all of them must be usable."""
    pool = make_pool()

    pool.grow(0, PAGES * PAGE)

    assert pool.num_free_pages == 0
    with pytest.raises(MemoryError, match="1 KV pages needed, 0 of 6 free"):
        pool.grow(0, 1)


def test_release_twice_is_no_error() -> None:
    """A plan that is sent again after a lost rank releases what is released already."""
    pool = make_pool()
    pool.grow(0, 5)

    pool.release(0)
    pool.release(0)
    pool.release(99)

    assert pool.num_free_pages == PAGES
    pool.check_invariants()


def test_layers_do_not_share_rows() -> None:
    """Page p of one layer goes with page p of all, but each layer has its own memory."""
    pool = make_pool()
    kv = random_kv(6, 0)
    append(pool, 0, kv)
    q_THD, _, _ = random_qkv(2, 1, head_dim=8)

    for layer in range(LAYERS):
        out, _ = pool.attend(layer, 0, q_THD)
        k_SKD, v_SKD = kv[layer].chunk(2, dim=1)
        expected, _ = softmax_attention(q_THD, k_SKD, v_SKD)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


def test_scale_is_passed_on() -> None:
    """As in `attend`."""
    pool = make_pool()
    kv = random_kv(6, 0)
    append(pool, 0, kv)
    q_THD, _, _ = random_qkv(1, 1, head_dim=8)

    out, _ = pool.attend(0, 0, q_THD, scale=2.0)

    k_SKD, v_SKD = kv[0].chunk(2, dim=1)
    expected, _ = softmax_attention(q_THD, k_SKD, v_SKD, scale=2.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


def test_sequence_without_rows_attends_to_nothing() -> None:
    """In decode a rank that holds none of a sequence still takes part, with weight 0."""
    out, lse = make_pool().attend(0, 5, random_qkv(1, 1, head_dim=8)[0])

    assert torch.equal(out, torch.zeros(1, 4, 8))
    assert torch.equal(lse, torch.full((1, 4), -torch.inf))
