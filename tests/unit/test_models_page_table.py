"""Pages are shared by count and copied when somebody writes; positions decide what is cut."""

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

from models.page_table import CacheOp, Fork, Grow, PageCopy, PageTable, Truncate

PAGE, PAGES = 4, 12
ids = st.integers(0, 4)


class TableMachine(RuleBasedStateMachine):
    """A table and what is in its pages, against a dict of every sequence's positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(num_pages=PAGES, page_tokens=PAGE)
        self.positions: dict[int, list[tuple[int, int]]] = {}  # with a mark of who wrote it
        self.pages: list[list[tuple[int, int] | None]] = [[None] * PAGE for _ in range(PAGES)]
        self.writes = 0

    @rule(sequence=ids, gaps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=3))
    def grow(self, sequence: int, gaps: list[tuple[int, int]]) -> None:
        rows = self.positions.get(sequence, [])
        end, spans = (rows[-1][0] + 1 if rows else 0), []
        for gap, count in gaps:
            spans.append((end + gap, count))
            end += gap + count
        first_row = len(rows)
        try:
            copy = self.table.grow(sequence, spans)
        except MemoryError:
            assert (
                self.table.pages_to_grow(sequence, sum(count for _, count in spans))
                > self.table.num_free_pages
            )
            return
        if copy is not None:
            self.pages[copy.target][: copy.num_rows] = self.pages[copy.source][: copy.num_rows]
        self.writes += 1
        new = [(start + i, self.writes) for start, count in spans for i in range(count)]
        if new:
            self.positions[sequence] = rows + new
        page_ids = self.table.run(sequence).page_ids
        for row, value in enumerate(new, first_row):
            self.pages[page_ids[row // PAGE]][row % PAGE] = value

    @precondition(lambda self: self.positions)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.positions)))
        target = min(set(range(99)) - self.positions.keys())
        position = data.draw(st.integers(0, self.positions[source][-1][0] + 2))
        self.table.fork(source, target, position)
        kept = [each for each in self.positions[source] if each[0] < position]
        if kept:
            self.positions[target] = kept

    @precondition(lambda self: self.positions)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.positions)))
        position = data.draw(st.integers(0, self.positions[sequence][-1][0] + 2))
        before = self.table.num_free_pages
        freed = self.table.pages_freed(sequence, position)
        self.table.truncate(sequence, position)
        assert self.table.num_free_pages == before + freed
        kept = [each for each in self.positions.pop(sequence) if each[0] < position]
        if kept:
            self.positions[sequence] = kept

    @invariant()
    def rows_are_where_the_table_says(self) -> None:
        self.table.check_invariants()
        assert self.table.sequence_ids() == self.positions.keys()
        for sequence, rows in self.positions.items():
            run = self.table.run(sequence)
            assert run.num_rows == len(rows)
            assert run.end == rows[-1][0] + 1
            for position in range(rows[-1][0] + 2):
                assert run.rows_below(position) == sum(each < position for each, _ in rows)
            found = [self.pages[run.page_ids[row // PAGE]][row % PAGE] for row in range(len(rows))]
            assert found == rows


def test_every_row_is_found_whatever_forks_grows_and_is_cut() -> None:
    """What one sequence writes never changes what another reads."""
    run_state_machine_as_test(
        TableMachine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None)
    )


def test_fork_shares_full_pages_and_copies_one() -> None:
    """A fork costs nothing until it grows, and then one page."""
    table = PageTable(num_pages=8, page_tokens=4)
    table.grow(1, [(0, 10)])
    table.fork(1, 2, 9)
    assert table.num_free_pages == 5

    copy = table.grow(2, [(9, 1)])

    assert copy == PageCopy(source=2, target=3, num_rows=1)
    assert table.run(2).page_ids == [0, 1, 3]
    assert table.run(1).page_ids == [0, 1, 2]


def test_the_same_operations_give_the_same_tables() -> None:
    """A rank executes what the coordinator decided, each its own share."""
    ops: list[CacheOp] = [
        Grow(sequence_id=1, spans_by_rank=(((0, 5), (15, 5)), ((5, 10),))),
        Fork(source_id=1, target_id=2, position=12),
        Grow(sequence_id=2, spans_by_rank=(((12, 1),), ())),
        Truncate(sequence_id=1, position=0),
    ]
    tables = [PageTable(num_pages=9, page_tokens=4) for _ in range(2)]

    for op in ops:
        for rank, table in enumerate(tables):
            table.apply(op, rank)

    assert [table.run(2).num_rows for table in tables] == [6, 7]
    assert [table.run(1).num_rows for table in tables] == [0, 0]


def test_a_table_without_room_is_left_as_it_was() -> None:
    """Nothing is taken where not all can be had."""
    table = PageTable(num_pages=2, page_tokens=4)
    table.grow(1, [(0, 3)])

    with pytest.raises(MemoryError, match="2 KV pages needed, 1 of 2 free"):
        table.grow(1, [(3, 6)])

    assert table.run(1).num_rows == 3
    table.check_invariants()
