"""What pass-KV and pass-Q have in common: one rank's part of a step's attention over the ring.

Both compute partials of one rank's queries over keys of one rank, at home or
visiting, and add them up sequence by sequence.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attention.kernel import attend, empty_partial
from attention.merge import merge_into
from attention.paged import PagedRows
from attention.ring import MiB, Ring
from attention.ring_sequence import RingSequence, Slice
from attention.timing import PartTimer


class RingAttention(ABC):
    """Exact causal attention of the new tokens of a step's sequences, layer after layer.

    One object serves all layers of a step and keeps its buffers.
    """

    def __init__(
        self,
        sequences: Sequence[RingSequence],
        ring: Ring,
        timer: PartTimer,
        *,
        piece_bytes: int = 64 * MiB,
        scale: float | None = None,
        on_round: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the step's sequences, the same on all ranks.

        Cached rows that travel do so in pieces of at most ``piece_bytes``, of a
        row at least. ``on_round`` is called `num_rounds` times a layer.
        """
        self._sequences = sequences
        self._ring = ring
        self._timer = timer
        self._piece_bytes = piece_bytes
        self._scale = scale
        self._on_round = on_round

    @abstractmethod
    def __call__(self, q_THD: Tensor, kv_TJD: Tensor, cached: Sequence[PagedRows]) -> Tensor:
        """Return ``out_THD``, float32, for this rank's queries.

        Queries and ``kv_TJD`` (contiguous: keys' heads, then values' heads) are
        of this rank's new tokens of all sequences, one sequence after another;
        ``cached`` are its earlier rows of each. Every rank of the ring must make
        this call.
        """

    @property
    def num_rounds(self) -> int:
        """How often ``on_round`` is called in one layer."""
        return self._ring.size

    def _counts(self, rank: int) -> list[int]:
        """How many new tokens of each sequence a rank holds."""
        return [sequence.zigzag.count(rank) for sequence in self._sequences]

    def _most_new(self) -> int:
        """How many new tokens the fullest rank holds."""
        return max(sum(self._counts(rank)) for rank in range(self._ring.size))

    def _sums(self, q_THD: Tensor, rank: int) -> "PartialSums":
        return PartialSums(q_THD, self._counts(rank), self._timer)

    def _add_new(self, sums: "PartialSums", query_rank: int, kv_TJD: Tensor, key_rank: int) -> None:
        """Add attention of ``query_rank``'s queries to the new keys of ``key_rank``."""
        shares = kv_TJD.split(self._counts(key_rank))
        for index, (sequence, share_TJD) in enumerate(zip(self._sequences, shares, strict=True)):
            sight = sequence.zigzag.sees(query_rank, key_rank)
            k_SKD, v_SKD = share_TJD[: sight.num_keys].chunk(2, dim=1)
            q_THD = sums.queries(index, sight.first_query)
            if q_THD.shape[0] and sight.num_keys:
                with self._timer("attention"):
                    partial = attend(q_THD, k_SKD, v_SKD, causal=sight.causal, scale=self._scale)
                sums.add(index, partial, sight.first_query)

    def _add_cached(self, sums: "PartialSums", rows: Slice, cached: PagedRows) -> None:
        """Add attention of a sequence's queries to rows of this rank, where they lie."""
        q_THD = sums.queries(rows.sequence)
        if q_THD.shape[0] and rows.num_rows:
            with self._timer("attention"):
                partial = cached.attend(
                    q_THD, rows=(rows.first_row, rows.first_row + rows.num_rows), scale=self._scale
                )
            sums.add(rows.sequence, partial)


class PartialSums:
    """Attention of one rank's queries to the keys met so far, sequence by sequence."""

    def __init__(self, q_THD: Tensor, counts: Sequence[int], timer: PartTimer) -> None:
        """Take the queries of all sequences, of which each has its count."""
        self._queries = q_THD.split(list(counts))
        self._partials: list[tuple[Tensor, Tensor] | None] = [None] * len(counts)
        self._timer = timer

    def queries(self, index: int, first_query: int = 0) -> Tensor:
        """Return the queries of a sequence, from one of them on."""
        return self._queries[index][first_query:]

    def add(self, index: int, partial: tuple[Tensor, Tensor], first_query: int = 0) -> None:
        """Merge a partial of the queries from ``first_query`` on, or keep it if it is the first."""
        held = self._partials[index]
        if held is None and first_query == 0:
            self._partials[index] = partial
            return
        with self._timer("merge"):
            if held is None:
                held = self._partials[index] = empty_partial(self._queries[index])
            merge_into(held[0][first_query:], held[1][first_query:], *partial)

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(out_THD, lse_TH)`` of each sequence."""
        for q_THD, partial in zip(self._queries, self._partials, strict=True):
            yield empty_partial(q_THD) if partial is None else partial

    def result(self) -> tuple[Tensor, Tensor]:
        """Return ``(out_THD, lse_TH)`` of all sequences, one after another."""
        if len(self._partials) == 1:
            return next(self.parts())
        outs, lses = zip(*self.parts(), strict=True)
        return torch.cat(outs), torch.cat(lses)
