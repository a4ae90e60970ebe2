"""What the ranks' pages hold, as the coordinator knows it: prefix reuse and eviction.

A sequence is *running* from `begin` to `finish`; then it is *kept* until its pages are
needed. A new sequence begins as a fork of one that starts alike, running or kept. Kept
sequences go in order of their last use, from their tails, and never what one that runs
needs. Every change is an operation that all ranks execute with the next plan.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.messages import TokenIds
from actors.prefix_tree import PrefixTree
from models.page_table import CacheOp, Fork, Grow, PageTable, Span, Truncate

# A shorter common beginning is a BOS token or a template's first words: not worth a fork,
# unless it is all of an earlier answer (a next turn) or all but the end of the prompt.
MIN_SHARED_TOKENS = 16


@dataclass
class _Sequence:
    salt: str
    token_ids: TokenIds  # accepted, with KV on the ranks: those in the tree
    final_rows: tuple[int, ...]  # that it comes to have on each rank before it decodes


@dataclass(frozen=True)
class Match:
    """The longest prefix of a prompt that the ranks hold."""

    tokens: int = 0
    source_id: int | None = None


class DeviceCache:
    """Running and kept sequences over all ranks' pages. Not thread-safe."""

    def __init__(
        self, *, num_ranks: int, num_pages: int, page_tokens: int, shares: bool = True
    ) -> None:
        """Begin with all pages free; without ``shares`` nothing is kept and nothing reused."""
        self.num_ranks = num_ranks
        self.rows_per_rank = num_pages * page_tokens
        self.shares = shares
        self._tables = [
            PageTable(num_pages=num_pages, page_tokens=page_tokens) for _ in range(num_ranks)
        ]
        self._trees: dict[str, PrefixTree] = {}
        self._running: dict[int, _Sequence] = {}
        self._kept: OrderedDict[int, _Sequence] = OrderedDict()  # the last used last
        self._ops: list[CacheOp] = []

    def match(self, salt: str, token_ids: TokenIds) -> Match:
        """Return what a prompt can share; its last token is always left to compute."""
        tree = self._trees.get(salt)
        if tree is None:
            return Match()
        tokens, source_id = tree.match(token_ids[:-1])
        if source_id is None:
            return Match()
        source = self._running.get(source_id) or self._kept[source_id]
        whole = min(len(source.token_ids), len(token_ids) - 1)
        return Match(tokens, source_id) if tokens >= min(MIN_SHARED_TOKENS, whole) else Match()

    def rows(self, sequence_id: int | None, position: int) -> tuple[int, ...]:
        """Return how many rows below a position each rank holds of a sequence (None: none)."""
        if sequence_id is None:
            return (0,) * self.num_ranks
        return tuple(table.run(sequence_id).rows_below(position) for table in self._tables)

    def free_pages(self) -> tuple[int, ...]:
        """Return how many pages of each rank no running sequence holds."""
        return tuple(
            table.num_pages - len(table.held_pages(self._running)) for table in self._tables
        )

    def fits(self, final_rows: Sequence[int], match: Match) -> bool:
        """Return whether a further sequence can be prefilled beside those that run."""
        shared_rows = self.rows(match.source_id, match.tokens)
        return all(
            self._fits(rank, rows, shared, match.source_id)
            for rank, (rows, shared) in enumerate(zip(final_rows, shared_rows, strict=True))
        )

    def begin(self, sequence_id: int, salt: str, match: Match, final_rows: Sequence[int]) -> None:
        """Let a sequence run; ``final_rows`` is what its prefill comes to on each rank."""
        self._running[sequence_id] = _Sequence(salt, np.empty(0, dtype=np.int32), tuple(final_rows))
        if match.source_id is not None:
            if match.source_id in self._kept:
                self._kept.move_to_end(match.source_id)
            self._apply(
                Fork(source_id=match.source_id, target_id=sequence_id, position=match.tokens)
            )

    def grow(self, sequence_id: int, spans_by_rank: Sequence[Sequence[Span]]) -> None:
        """Make room for new tokens of a running sequence; kept ones make way.

        Raises:
            MemoryError: Those that run hold too much of a rank; nothing is grown.
        """
        for rank, (table, spans) in enumerate(zip(self._tables, spans_by_rank, strict=True)):
            rows = sum(count for _, count in spans)
            self._make_room(rank, table.pages_to_grow(sequence_id, rows))
            needed = table.pages_to_grow(sequence_id, rows)
            if table.num_free_pages < needed:
                raise MemoryError(f"rank {rank} has no room for {rows} more rows beside what runs")
        self._apply(Grow(sequence_id=sequence_id, spans_by_rank=tuple(map(tuple, spans_by_rank))))

    def accept(self, sequence_id: int, token_ids: TokenIds) -> None:
        """Let others share these tokens of a running sequence, whose KV the ranks hold."""
        sequence = self._running[sequence_id]
        sequence.token_ids = token_ids
        if self.shares and len(token_ids):
            self._trees.setdefault(sequence.salt, PrefixTree()).insert(sequence_id, token_ids)

    def truncate(self, sequence_id: int, position: int) -> None:
        """Drop rows of a running sequence that were computed and not accepted."""
        self._apply(Truncate(sequence_id=sequence_id, position=position))

    def finish(self, sequence_id: int) -> None:
        """End a running sequence; what was accepted of it is kept for others."""
        sequence = self._running.pop(sequence_id)
        if not self.shares or not len(sequence.token_ids):
            self._forget(sequence_id, sequence)
            return
        if any(table.run(sequence_id).end > len(sequence.token_ids) for table in self._tables):
            self._apply(Truncate(sequence_id=sequence_id, position=len(sequence.token_ids)))
        self._kept[sequence_id] = sequence
        tree = self._trees[sequence.salt]
        for covered_id in [each for each in tree.covered_by(sequence_id) if each in self._kept]:
            self._forget(covered_id, self._kept.pop(covered_id))
        if tree.is_covered(sequence_id):
            self._forget(sequence_id, self._kept.pop(sequence_id))

    def clear(self) -> None:
        """Give up all that is kept; what runs goes on, and is not shared from now on."""
        for sequence_id in list(self._kept):
            self._forget(sequence_id, self._kept.pop(sequence_id))
        for sequence_id, sequence in self._running.items():
            self._leave_tree(sequence_id, sequence)
            sequence.token_ids = sequence.token_ids[:0]

    def take_ops(self) -> tuple[CacheOp, ...]:
        """Return the operations since the last call, for all ranks to execute in order."""
        ops, self._ops = tuple(self._ops), []
        return ops

    def page_counts(self) -> list[dict[str, int]]:
        """Return each rank's pages: all, free, and those of running sequences."""
        return [
            {
                "total": table.num_pages,
                "free": table.num_free_pages,
                "running": len(table.held_pages(self._running)),
            }
            for table in self._tables
        ]

    @property
    def kept_tokens(self) -> int:
        """Tokens of kept sequences; those that several share count for each."""
        return sum(len(sequence.token_ids) for sequence in self._kept.values())

    @property
    def num_kept(self) -> int:
        """Kept sequences."""
        return len(self._kept)

    def check_invariants(self) -> None:
        """Assert that pages are free or held by what runs or is kept, and trees hold only these."""
        known = self._running | self._kept
        for table in self._tables:
            table.check_invariants()
            assert table.sequence_ids() <= known.keys()
        for sequence_id, sequence in known.items():
            in_tree = sequence_id in self._trees.get(sequence.salt, ())
            assert in_tree == (self.shares and len(sequence.token_ids) > 0)
            accepted = len(sequence.token_ids)
            assert sum(self.rows(sequence_id, accepted)) == accepted
        for sequence_id, sequence in self._kept.items():
            assert max(table.run(sequence_id).end for table in self._tables) == len(
                sequence.token_ids
            )
        assert sum(map(len, self._trees.values())) <= len(known)

    def _fits(self, rank: int, final_rows: int, shared_rows: int, source_id: int | None) -> bool:
        table = self._tables[rank]
        pages = table.held_pages(self._running)
        if source_id is not None:
            pages.update(table.run(source_id).page_ids[: -(-shared_rows // table.page_tokens)])
        to_come = sum(
            table.pages_to_come(each, sequence.final_rows[rank])
            for each, sequence in self._running.items()
        )
        # A page that is shared in part is copied before it is written.
        own = -(-final_rows // table.page_tokens) - shared_rows // table.page_tokens
        return len(pages) + to_come + own <= table.num_pages

    def _make_room(self, rank: int, pages: int) -> None:
        """Cut kept sequences, the longest unused first, until a rank has so many free pages."""
        table = self._tables[rank]
        progress = True
        while progress and table.num_free_pages < pages:
            progress = False
            for sequence_id in list(self._kept):
                missing = pages - table.num_free_pages
                if missing <= 0:
                    return
                if sequence_id in self._kept and table.pages_freed(sequence_id, 0):
                    self._cut(sequence_id, table, missing)
                    progress = True

    def _cut(self, sequence_id: int, table: PageTable, missing: int) -> None:
        """Cut a kept sequence's tail, as little as frees the missing pages."""
        keep, drop = 0, len(self._kept[sequence_id].token_ids)
        while drop - keep > 1:  # freeing enough at keep (or at 0 at best), too little at drop
            middle = (keep + drop) // 2
            if table.pages_freed(sequence_id, middle) >= missing:
                keep = middle
            else:
                drop = middle
        sequence = self._kept[sequence_id]
        sequence.token_ids = sequence.token_ids[:keep]
        tree = self._trees[sequence.salt]
        tree.insert(sequence_id, sequence.token_ids)
        if keep == 0 or tree.is_covered(sequence_id):
            self._forget(sequence_id, self._kept.pop(sequence_id))
        else:
            self._apply(Truncate(sequence_id=sequence_id, position=keep))

    def _forget(self, sequence_id: int, sequence: _Sequence) -> None:
        self._leave_tree(sequence_id, sequence)
        self._apply(Truncate(sequence_id=sequence_id, position=0))

    def _leave_tree(self, sequence_id: int, sequence: _Sequence) -> None:
        tree = self._trees.get(sequence.salt)
        if tree is not None:
            tree.remove(sequence_id)
            if not len(tree):
                del self._trees[sequence.salt]

    def _apply(self, op: CacheOp) -> None:
        for rank, table in enumerate(self._tables):
            table.apply(op, rank)
        self._ops.append(op)
