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

from attention.paged_quantised import _BLOCK_ROWS
from models.page_pool import KVCacheDtype, PagePool
from models.page_table import Fork, Grow, Truncate
from tests.reference import random_qkv, softmax_attention

LAYERS, PAGES, PAGE = 2, 6, 4
sequence_ids = st.integers(0, 3)


def make_pool(num_pages: int = PAGES, kv_cache_dtype: KVCacheDtype = "auto") -> PagePool:
    return PagePool(
        num_layers=LAYERS,
        num_pages=num_pages,
        page_tokens=PAGE,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
        kv_cache_dtype=kv_cache_dtype,
    )


def quantised(rows: Tensor, kv_cache_dtype: KVCacheDtype) -> Tensor:
    """Return rows as a pool of this dtype gives them back, row by row and in plain float64."""
    if kv_cache_dtype == "auto":
        return rows
    largest = rows.double().abs().amax(-1, keepdim=True)
    if kv_cache_dtype == "int8":
        return ((rows.double() / largest * 127).round() / 127 * largest).float()
    codes = (rows.double() / largest * 448).float().to(torch.float8_e4m3fn)
    return (codes.double() / 448 * largest).float()


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

    kv_cache_dtype: KVCacheDtype = "auto"

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(kv_cache_dtype=self.kv_cache_dtype)
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
        kv = [quantised(rows, self.kv_cache_dtype) for rows in kv]
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

    @precondition(lambda self: self.rows)
    @rule(layer=st.integers(0, LAYERS - 1))
    def attend_each(self, layer: int) -> None:
        """One query each, of sequences without rows too: as in decode."""
        q_BHD, _, _ = random_qkv(4, 1, head_dim=8)
        runs = [(each, self.pool.table.run(each).num_rows) for each in range(4)]
        out, lse = self.pool.attend(layer, self.pool.batch(runs), q_BHD)
        for each in range(4):
            k_SKD, v_SKD = self.rows.get(each, random_kv(0, 0))[layer].chunk(2, dim=1)
            expected = softmax_attention(q_BHD[each : each + 1], k_SKD, v_SKD)
            torch.testing.assert_close(
                (out[each : each + 1].double(), lse[each : each + 1].double()),
                expected,
                rtol=1e-5,
                atol=2e-6,
            )

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def copy_rows(self, data: st.DataObject, layer: int) -> None:
        """What travels round the ring are rows of the model's dtype."""
        sequence_id = data.draw(st.sampled_from(sorted(self.rows)))
        rows_SJD = self.rows[sequence_id][layer]
        first = data.draw(st.integers(0, len(rows_SJD)))
        copied = torch.empty_like(rows_SJD[first:])
        self.pool.rows(layer, sequence_id, len(rows_SJD)).copy_into(first, copied)
        torch.testing.assert_close(copied, rows_SJD[first:], rtol=1e-6, atol=0)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        self.pool.table.check_invariants()
        assert self.pool.table.sequence_ids() == self.rows.keys()


class Int8PoolMachine(PagePoolMachine):
    kv_cache_dtype: KVCacheDtype = "int8"


class FP8PoolMachine(PagePoolMachine):
    kv_cache_dtype: KVCacheDtype = "fp8"


@pytest.mark.parametrize(
    ("machine", "max_examples"), [(PagePoolMachine, 40), (Int8PoolMachine, 15), (FP8PoolMachine, 8)]
)
def test_any_series_of_steps_keeps_rows_and_leaks_no_page(
    machine: type[PagePoolMachine], max_examples: int
) -> None:
    """Sequences come, fork, grow, are refused, cut and go in any order."""
    run_state_machine_as_test(
        machine, settings=settings(deadline=None, max_examples=max_examples, stateful_step_count=25)
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


@pytest.mark.parametrize("dtype", ["auto", "int8", "fp8"])
def test_step_attends_to_what_is_stored(dtype: KVCacheDtype) -> None:
    """Bit for bit: a token's answer must not depend on which tokens came in its step."""
    pool = make_pool(kv_cache_dtype=dtype)
    kv_TJD = random_kv(6, 0)[0]

    new = pool.as_stored(kv_TJD)
    append(pool, 0, [new] * LAYERS)
    append(pool, 1, [kv_TJD] * LAYERS)

    for sequence_id in (0, 1):
        stored = torch.empty_like(new)
        pool.rows(0, sequence_id, 6).copy_into(0, stored)
        assert torch.equal(stored, new)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_rows_of_single_tokens_are_stored_as_those_of_many(dtype: KVCacheDtype) -> None:
    """Decode writes each row to its slot, prefill a run at once."""
    kv = random_kv(6, 0)
    pool = make_pool(kv_cache_dtype=dtype)
    append(pool, 0, kv)
    pool.apply(Grow(sequence_id=1, spans_by_rank=(((0, 6),),)), 0)
    order = [4, 0, 5, 2, 1, 3]
    for layer in range(LAYERS):
        pool.store_at(layer, pool.slots([(1, row) for row in order]), kv[layer][order])

    for layer in range(LAYERS):
        first, second = torch.empty(2, 6, 4, 8)
        pool.rows(layer, 0, 6).copy_into(0, first)
        pool.rows(layer, 1, 6).copy_into(0, second)
        assert torch.equal(first, second)


@pytest.mark.parametrize("num_rows", [_BLOCK_ROWS - 1, _BLOCK_ROWS, 2 * _BLOCK_ROWS + 3])
def test_long_runs_are_decoded_block_by_block(num_rows: int) -> None:
    """Blocks leave out no row at their edges, from any first row on."""
    pool = make_pool(num_pages=num_rows // PAGE + 1, kv_cache_dtype="int8")
    kv = random_kv(num_rows, 0)
    append(pool, 0, kv)
    rows = pool.rows(1, 0, num_rows)
    expected = quantised(kv[1], "int8")
    q_THD, _, _ = random_qkv(2, 1, head_dim=8)

    copied = torch.empty_like(expected[1:])
    rows.copy_into(1, copied)
    torch.testing.assert_close(copied, expected[1:], rtol=1e-6, atol=0)
    for first, end in ((0, num_rows), (5, num_rows - 1)):
        out, lse = rows.attend(q_THD, rows=(first, end))
        k_SKD, v_SKD = expected[first:end].chunk(2, dim=1)
        reference = softmax_attention(q_THD, k_SKD, v_SKD)
        torch.testing.assert_close((out.double(), lse.double()), reference, rtol=1e-5, atol=3e-6)
