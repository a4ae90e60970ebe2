"""Ring pass-KV: queries stay, keys and values travel (algorithm 2 of arXiv 2411.01783).

What a rank sends at a time is a *part*: its new tokens' keys and values, or a
piece of its cached rows, of bounded size. Parts go round in laps: in lap 0 every
rank's new share, in lap 1 the first pieces, in lap 2 the second, ... In round j
of a lap rank k attends to the part of rank ``s = (k - j) mod N`` while the next
part is in flight: N - 1 transfers a lap. During a lap's last round that is the
first transfer of the next lap, so the link has N rounds for N - 1 transfers.

Which new keys a query sees is in `Zigzag.sees`; cached rows it sees all. Ranks
hold different numbers of rows, and all know all of them: nothing is padded, and a
rank whose rows have all gone sends nothing.
"""

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from attention.kernel import attend
from attention.paged import PagedRows
from attention.ring_attention import PartialSums, RingAttention
from attention.ring_sequence import Slice, slices_between

Piece = Sequence[Slice]


class PassKVAttention(RingAttention):
    """Exact causal attention by pass-KV.

    Beside its own share a rank needs two buffers for arriving parts, and where it
    has cached rows one of a piece, to send them from. It reads its own in their pages.
    """

    # Made in the first layer, which tells the bytes of a row.
    _pieces: Sequence[Sequence[Piece]] | None = None  # cached rows by lap, from 1 on, and rank
    _arriving: Sequence[Tensor]
    _leaving: Tensor

    def __call__(self, q_THD: Tensor, kv_TJD: Tensor, cached: Sequence[PagedRows]) -> Tensor:
        """See `RingAttention`."""
        if self._pieces is None:
            self._pieces = self._cut(kv_TJD)
            self._allocate(kv_TJD)
        rank, num_laps = self._ring.rank, 1 + len(self._pieces)
        sums = self._sums(q_THD, rank)
        parts = self._parts(num_laps, kv_TJD, cached)
        for done, (lap, source, part_SJD) in enumerate(parts, 1):
            if lap == 0:
                self._add_new(sums, rank, part_SJD, source)
            elif source == rank:
                for rows in self._piece(lap, rank):
                    self._add_cached(sums, rows, cached[rows.sequence])
            else:
                self._add_piece(sums, self._piece(lap, source), part_SJD)
            if done % num_laps == 0:  # `num_rounds` times a layer, however many laps
                self._on_round()
        return sums.result()[0]

    def _parts(
        self, num_laps: int, kv_TJD: Tensor, cached: Sequence[PagedRows]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield ``(lap, source, part)`` of every round, while the next transfer is under way.

        In the round of this rank's own cached rows the part is none of theirs.
        """
        ring = self._ring
        sent, pending = 0, None
        part_SJD = arriving_SJD = kv_TJD
        for lap, hop in itertools.product(range(num_laps), range(ring.size)):
            if pending is not None and hop > 0:
                with self._timer("wait"):
                    pending.wait()
                part_SJD, pending = arriving_SJD, None
            if pending is None and sent < num_laps * (ring.size - 1):
                to_lap, to_hop = divmod(sent, ring.size - 1)
                source = (ring.rank - to_hop - 1) % ring.size
                leaving_SJD = part_SJD if to_hop > 0 else self._own_part(to_lap, kv_TJD, cached)
                arriving_SJD = self._arriving[sent % 2][: self._num_rows(to_lap, source)]
                with self._timer("exchange"):
                    pending = ring.exchange(leaving_SJD, arriving_SJD)
                sent += 1
            yield lap, (ring.rank - hop) % ring.size, part_SJD

    def _own_part(self, lap: int, kv_TJD: Tensor, cached: Sequence[PagedRows]) -> Tensor:
        """Return what this rank sends round in a lap; its cached rows are gathered for it."""
        if lap == 0:
            return kv_TJD
        part_SJD = self._leaving[: self._num_rows(lap, self._ring.rank)]
        with self._timer("gather"):
            for rows, share_SJD in self._shares(self._piece(lap, self._ring.rank), part_SJD):
                cached[rows.sequence].copy_into(rows.first_row, share_SJD)
        return part_SJD

    def _add_piece(self, sums: PartialSums, piece: Piece, part_SJD: Tensor) -> None:
        """Add attention to another rank's cached rows."""
        for rows, share_SJD in self._shares(piece, part_SJD):
            q_THD = sums.queries(rows.sequence)
            if q_THD.shape[0]:
                with self._timer("attention"):
                    k_SKD, v_SKD = share_SJD.chunk(2, dim=1)
                    partial = attend(q_THD, k_SKD, v_SKD, scale=self._scale)
                sums.add(rows.sequence, partial)

    def _shares(self, piece: Piece, part_SJD: Tensor) -> Iterator[tuple[Slice, Tensor]]:
        """Yield the rows of each sequence in a part."""
        yield from zip(piece, part_SJD.split([rows.num_rows for rows in piece]), strict=True)

    def _piece(self, lap: int, rank: int) -> Piece:
        assert self._pieces is not None
        return self._pieces[lap - 1][rank]

    def _num_rows(self, lap: int, rank: int) -> int:
        """How many rows a rank's part in a lap has."""
        if lap == 0:
            return sum(self._counts(rank))
        return sum(rows.num_rows for rows in self._piece(lap, rank))

    def _cut(self, kv_TJD: Tensor) -> Sequence[Sequence[Piece]]:
        """Cut every rank's cached rows into pieces; a ring of one sends none and has one piece."""
        counts = [
            [sequence.cached_rows[rank] for sequence in self._sequences]
            for rank in range(self._ring.size)
        ]
        most = max(map(sum, counts))
        row_bytes = kv_TJD.shape[1] * kv_TJD.shape[2] * kv_TJD.element_size()
        piece_rows = most if self._ring.size == 1 else max(1, self._piece_bytes // row_bytes)
        return [
            [tuple(slices_between(of_rank, first, first + piece_rows)) for of_rank in counts]
            for first in range(0, most, max(1, piece_rows))
        ]

    def _allocate(self, like_TJD: Tensor) -> None:
        """Make room for what arrives, and for what cached rows are sent from."""
        size, laps = self._ring.size, range(1 + len(self._pieces or ()))
        largest = max(self._num_rows(lap, rank) for lap in laps for rank in range(size))
        own = max((self._num_rows(lap, self._ring.rank) for lap in laps[1:]), default=0)
        row = like_TJD.shape[1:]
        num_buffers = min(2, len(laps) * (size - 1))
        self._arriving = [like_TJD.new_empty(largest, *row) for _ in range(num_buffers)]
        self._leaving = like_TJD.new_empty(own if size > 1 else 0, *row)
