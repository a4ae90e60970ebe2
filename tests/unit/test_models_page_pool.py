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
from models.page_table import Fork, Grow, Truncate
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
    first_row, end = pool.table.run(sequence_id).num_rows, pool.table.run(sequence_id).end
    span = (end, len(kv[0]))
    pool.apply(Grow(sequence_id=sequence_id, spans_by_rank=((span,),)), 0)
    for layer, kv_TJD in enumerate(kv):
        pool.store(layer, sequence_id, first_row, kv_TJD)


def attend(pool: PagePool, layer: int, sequence_id: int, q_THD: Tensor) -> tuple[Tensor, Tensor]:
    return pool.rows(layer, sequence_id, pool.table.run(sequence_id).num_rows).attend(q_THD)


class PagePoolMachine(RuleBasedStateMachine):
    """The pool against a dict that keeps every sequence's rows in a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool()
        self.rows: dict[int, list[Tensor]] = {}
        self.draws = 0

    @rule(sequence_id=sequence_ids, count=st.integers(0, 11))
    def grow(self, sequence_id: int, count: int) -> None:
        self.draws += 1
        kv = random_kv(count, self.draws)
        needed = self.pool.table.pages_to_grow(sequence_id, count)
        free = self.pool.table.num_free_pages
        if needed > free:
            with pytest.raises(MemoryError, match=f"{needed} KV pages needed, {free} of {PAGES}"):
                append(self.pool, sequence_id, kv)
            return
        append(self.pool, sequence_id, kv)
        old = self.rows.get(sequence_id, random_kv(0, 0))
        if count:
            self.rows[sequence_id] = [torch.cat(pair) for pair in zip(old, kv, strict=True)]

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), share=st.floats(0, 1))
    def fork(self, data: st.DataObject, share: float) -> None:
        source = data.draw(st.sampled_from(sorted(self.rows)))
        free_ids = sorted({0, 1, 2, 3} - self.rows.keys())
        position = int(share * len(self.rows[source][0]))
        if not free_ids or not position:
            return
        self.pool.apply(Fork(source_id=source, target_id=free_ids[0], position=position), 0)
        self.rows[free_ids[0]] = [rows[:position] for rows in self.rows[source]]

    @rule(sequence_id=sequence_ids, share=st.floats(0, 1))
    def truncate(self, sequence_id: int, share: float) -> None:
        rows = self.rows.pop(sequence_id, random_kv(0, 0))
        position = int(share * len(rows[0]))
        self.pool.apply(Truncate(sequence_id=sequence_id, position=position), 0)
        if position:
            self.rows[sequence_id] = [each[:position] for each in rows]

    @precondition(lambda self: self.rows)
    @rule(sequence_id=sequence_ids, layer=st.integers(0, LAYERS - 1), queries=st.integers(1, 3))
    def attend(self, sequence_id: int, layer: int, queries: int) -> None:
        q_THD, _, _ = random_qkv(queries, 1, head_dim=8)
        out, lse = attend(self.pool, layer, sequence_id, q_THD)
        k_SKD, v_SKD = self.rows.get(sequence_id, random_kv(0, 0))[layer].chunk(2, dim=1)
        expected_out, expected_lse = softmax_attention(q_THD, k_SKD, v_SKD)
        torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-6)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        self.pool.table.check_invariants()
        assert self.pool.table.sequence_ids() == self.rows.keys()


def test_any_series_of_steps_keeps_rows_and_leaks_no_page() -> None:
    """Sequences come, fork, grow, are refused, cut and go in any order."""
    run_state_machine_as_test(
        PagePoolMachine, settings=settings(deadline=None, max_examples=40, stateful_step_count=25)
    )


def test_layers_do_not_share_rows() -> None:
    """Page p of one layer goes with page p of all, but each layer has its own memory."""
    pool = make_pool()
    kv = random_kv(6, 0)
    append(pool, 0, kv)
    q_THD, _, _ = random_qkv(2, 1, head_dim=8)

    for layer in range(LAYERS):
        out, _ = attend(pool, layer, 0, q_THD)
        k_SKD, v_SKD = kv[layer].chunk(2, dim=1)
        expected, _ = softmax_attention(q_THD, k_SKD, v_SKD)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


def test_sequence_without_rows_attends_to_nothing() -> None:
    """In decode a rank that holds none of a sequence still takes part, with weight 0."""
    out, lse = attend(make_pool(), 0, 5, random_qkv(1, 1, head_dim=8)[0])

    assert torch.equal(out, torch.zeros(1, 4, 8))
    assert torch.equal(lse, torch.full((1, 4), -torch.inf))
