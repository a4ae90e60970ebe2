"""Which rows of which sequence lie in which pages of one rank: bookkeeping without tensors.

Every rank keeps a table of its own pages, and the coordinator keeps one for each rank.
Both execute the same operations in the same order, so both know the same. That is how
the coordinator decides alone what is evicted, and a rank never runs out of pages.

A run's rows ascend by position, so the rows of any prefix of a sequence come first on
every rank: a fork shares their pages by count, and what is cut off are last rows.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Span = tuple[int, int]  # first position, number of tokens


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A new sequence begins with the tokens below ``position`` of another one."""

    source_id: int
    target_id: int
    position: int


@dataclass(frozen=True, kw_only=True)
class Truncate:
    """All rows at and behind ``position`` are dropped; at 0 the sequence is gone."""

    sequence_id: int
    position: int


@dataclass(frozen=True, kw_only=True)
class Grow:
    """Room for new tokens: the spans of positions that each rank keeps."""

    sequence_id: int
    spans_by_rank: tuple[tuple[Span, ...], ...]


CacheOp = Fork | Truncate | Grow


@dataclass(frozen=True, kw_only=True)
class PageCopy:
    """The first rows of a page that two runs share are copied, because one of them grows."""

    source: int
    target: int
    num_rows: int


@dataclass
class Run:
    """One rank's rows of one sequence, in order of position, and the pages they lie in."""

    page_ids: list[int] = field(default_factory=list)
    num_rows: int = 0
    # Rows of consecutive positions: where each such piece begins, and its first row.
    _positions: list[int] = field(default_factory=list)
    _rows: list[int] = field(default_factory=list)

    def rows_below(self, position: int) -> int:
        """Return how many rows have a position below the given one."""
        piece = bisect_left(self._positions, position) - 1
        if piece < 0:
            return 0
        end_row = self._rows[piece + 1] if piece + 1 < len(self._rows) else self.num_rows
        return min(end_row, self._rows[piece] + position - self._positions[piece])

    @property
    def end(self) -> int:
        """The position behind the last row's, 0 without rows."""
        if not self._rows:
            return 0
        return self._positions[-1] + self.num_rows - self._rows[-1]

    def spans_between(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return ``(position, row, count)`` of each piece of rows from one position to another."""
        spans = []
        first_row, end_row = self.rows_below(start), self.rows_below(end)
        piece = bisect_right(self._rows, first_row) - 1
        while first_row < end_row:
            is_last = piece + 1 == len(self._rows)
            piece_end = end_row if is_last else min(end_row, self._rows[piece + 1])
            position = self._positions[piece] + first_row - self._rows[piece]
            spans.append((position, first_row, piece_end - first_row))
            first_row, piece = piece_end, piece + 1
        return spans

    def append(self, start: int, count: int) -> None:
        """Add rows of ``count`` positions from ``start`` on."""
        assert start >= self.end, "a run's rows ascend by position"
        if count and (start != self.end or not self._rows):
            self._positions.append(start)
            self._rows.append(self.num_rows)
        self.num_rows += count

    def cut(self, num_rows: int) -> None:
        """Keep the first rows only."""
        self.num_rows = num_rows
        pieces = bisect_left(self._rows, num_rows)
        del self._positions[pieces:], self._rows[pieces:]

    def prefix(self, num_rows: int, page_tokens: int) -> "Run":
        """Return a run of the first rows, in the same pages."""
        pages = self.page_ids[: -(-num_rows // page_tokens)]
        run = Run(pages, self.num_rows, list(self._positions), list(self._rows))
        run.cut(num_rows)
        return run


class PageTable:
    """The pages of one rank: who holds them, and which are free. Not thread-safe.

    Free pages are given out lowest first, so that a run's pages tend to be
    neighbours, which kernels read in one call.
    """

    def __init__(self, *, num_pages: int, page_tokens: int) -> None:
        """Begin with all pages free."""
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = list(range(num_pages))
        self._holders = [0] * num_pages  # runs that a page belongs to
        self._runs: dict[int, Run] = {}

    @property
    def num_free_pages(self) -> int:
        """Pages that belong to no run."""
        return len(self._free)

    def run(self, sequence_id: int) -> Run:
        """Return the run of a sequence, empty if it has none."""
        return self._runs.get(sequence_id) or Run()

    def apply(self, op: CacheOp, rank: int) -> PageCopy | None:
        """Execute an operation; return the copy of a page's rows that it asks for, if any.

        Raises:
            MemoryError: The table has too few free pages; nothing is changed.
        """
        if isinstance(op, Grow):
            return self.grow(op.sequence_id, op.spans_by_rank[rank])
        if isinstance(op, Fork):
            self.fork(op.source_id, op.target_id, op.position)
        else:
            self.truncate(op.sequence_id, op.position)
        return None

    def pages_to_grow(self, sequence_id: int, num_rows: int) -> int:
        """Return how many free pages further rows of a sequence take."""
        run = self.run(sequence_id)
        more = -(-(run.num_rows + num_rows) // self.page_tokens) - len(run.page_ids)
        return more + (num_rows > 0 and self._shares_last_page(run))

    def grow(self, sequence_id: int, spans: Sequence[Span]) -> PageCopy | None:
        """Add rows for spans of positions; see `apply`."""
        run = self.run(sequence_id)
        num_rows = sum(count for _, count in spans)
        if num_rows == 0:
            return None
        needed = self.pages_to_grow(sequence_id, num_rows)
        if needed > len(self._free):
            raise MemoryError(
                f"{needed} KV pages needed, {len(self._free)} of {self.num_pages} free"
            )
        new_ids = [heapq.heappop(self._free) for _ in range(needed)]
        copy = None
        if self._shares_last_page(run):
            rest = run.num_rows % self.page_tokens
            copy = PageCopy(source=run.page_ids[-1], target=new_ids[0], num_rows=rest)
            self._drop_pages(run, len(run.page_ids) - 1)
        self._runs[sequence_id] = run
        run.page_ids += new_ids
        self._hold(new_ids)
        for start, count in spans:
            run.append(start, count)
        return copy

    def fork(self, source_id: int, target_id: int, position: int) -> None:
        """Let a new sequence hold all rows of another one below a position."""
        assert target_id not in self._runs, "a fork makes a new sequence"
        source = self.run(source_id)
        num_rows = source.rows_below(position)
        if num_rows:
            target = source.prefix(num_rows, self.page_tokens)
            self._hold(target.page_ids)
            self._runs[target_id] = target

    def truncate(self, sequence_id: int, position: int) -> None:
        """Drop all rows at and behind a position; an unknown sequence is no error."""
        run = self.run(sequence_id)
        run.cut(run.rows_below(position))
        self._drop_pages(run, -(-run.num_rows // self.page_tokens))
        if not run.num_rows:
            self._runs.pop(sequence_id, None)

    def release(self, sequence_id: int) -> None:
        """Drop a sequence."""
        self.truncate(sequence_id, 0)

    def pages_freed(self, sequence_id: int, position: int) -> int:
        """Return how many pages would become free if a sequence were truncated."""
        run = self.run(sequence_id)
        kept = -(-run.rows_below(position) // self.page_tokens)
        return sum(self._holders[page_id] == 1 for page_id in run.page_ids[kept:])

    def pages_to_come(self, sequence_id: int, final_rows: int) -> int:
        """Return how many free pages a sequence takes until it has so many rows."""
        return self.pages_to_grow(sequence_id, max(0, final_rows - self.run(sequence_id).num_rows))

    def held_pages(self, sequence_ids: Iterable[int]) -> set[int]:
        """Return the pages that these sequences hold."""
        return {page_id for each in sequence_ids for page_id in self.run(each).page_ids}

    def sequence_ids(self) -> set[int]:
        """Return the sequences that hold pages."""
        return set(self._runs)

    def check_invariants(self) -> None:
        """Assert that every page is free or held, counted right, and that runs fill their pages."""
        holders = [0] * self.num_pages
        for run in self._runs.values():
            assert run.num_rows > 0
            assert len(run.page_ids) == -(-run.num_rows // self.page_tokens)
            assert run.rows_below(run.end) == run.num_rows
            for page_id in run.page_ids:
                holders[page_id] += 1
        assert holders == self._holders
        assert sorted(self._free) == [page for page, count in enumerate(holders) if not count]

    def _shares_last_page(self, run: Run) -> bool:
        """Whether new rows of a run would begin in a page that others read too."""
        return run.num_rows % self.page_tokens > 0 and self._holders[run.page_ids[-1]] > 1

    def _hold(self, page_ids: Iterable[int]) -> None:
        for page_id in page_ids:
            self._holders[page_id] += 1

    def _drop_pages(self, run: Run, kept: int) -> None:
        for page_id in run.page_ids[kept:]:
            self._holders[page_id] -= 1
            if not self._holders[page_id]:
                heapq.heappush(self._free, page_id)
        del run.page_ids[kept:]
