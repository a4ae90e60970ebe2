"""Ring pass-Q: keys and values stay, queries travel (algorithm 3 of arXiv 2411.01783).

In round j rank k attends with the queries of rank ``s = (k - j) mod N`` to its own
keys, cached ones in their pages and new ones by `Zigzag.sees`, while the queries
for the next round are in flight. Each partial goes back to rank s as soon as it
is computed and not in one All2All after the last round, so that only the last
one's way is not hidden behind computation (as in TokenRing, arXiv 2412.20501).

A rank merges its own partial first and then those of the others in order of
round, whenever they arrive: the bits of a result do not depend on timing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attention.merge import merge_into
from attention.paged import PagedRows
from attention.ring import PendingExchange
from attention.ring_attention import RingAttention
from attention.ring_sequence import Slice


class PassQAttention(RingAttention):
    """Exact causal attention by pass-Q.

    A rank needs two buffers for the queries of the fullest rank, and as
    ``[T, H, D + 1]`` float32 two for such queries' partials and two for its own.
    """

    _visiting: Sequence[Tensor] = ()  # queries, in turns
    _leaving: Sequence[Tensor] = ()  # others' partials, in turns
    _returning: Sequence[Tensor] = ()  # partials of this rank's queries, in turns

    def __call__(self, q_THD: Tensor, kv_TJD: Tensor, cached: Sequence[PagedRows]) -> Tensor:
        """See `RingAttention`."""
        ring = self._ring
        if ring.size > 1 and not self._visiting:
            self._allocate(q_THD)
        visiting_THD = q_THD.contiguous()
        returns: list[PendingExchange] = []
        for turn in range(ring.size):
            query_rank = (ring.rank - turn) % ring.size
            pending = None
            if turn < ring.size - 1:
                num_queries = sum(self._counts((query_rank - 1) % ring.size))
                arriving_THD = self._visiting[turn % 2][:num_queries]
                with self._timer("exchange"):
                    pending = ring.exchange(visiting_THD, arriving_THD)
            partial = self._attend_here(visiting_THD, query_rank, kv_TJD, cached)
            if turn == 0:
                out_THD, lse_TH = partial
            else:
                returns.append(self._send_back(turn, partial))
            if turn > 1:
                self._merge(returns[turn - 2], turn - 1, out_THD, lse_TH)
            if pending is not None:
                with self._timer("wait"):
                    pending.wait()
                visiting_THD = arriving_THD
            self._on_round()
        if returns:
            self._merge(returns[-1], ring.size - 1, out_THD, lse_TH)
        return out_THD

    def _attend_here(
        self, q_THD: Tensor, query_rank: int, kv_TJD: Tensor, cached: Sequence[PagedRows]
    ) -> tuple[Tensor, Tensor]:
        """Return the partial of a rank's queries over all keys that lie here."""
        sums = self._sums(q_THD, query_rank)
        self._add_new(sums, query_rank, kv_TJD, self._ring.rank)
        for index, sequence in enumerate(self._sequences):
            rows = Slice(index, 0, sequence.cached_rows[self._ring.rank])
            self._add_cached(sums, rows, cached[index])
        return sums.result()

    def _send_back(self, turn: int, partial: tuple[Tensor, Tensor]) -> PendingExchange:
        """Send visitors' partial home; what comes in turn is of this rank's queries."""
        part_THD, lse_TH = partial
        packed = self._leaving[turn % 2][: len(part_THD)]
        with self._timer("exchange"):
            torch.cat([part_THD, lse_TH.unsqueeze(-1)], dim=-1, out=packed)
            return self._ring.exchange(packed, self._returning[turn % 2], hops=-turn)

    def _merge(self, pending: PendingExchange, turn: int, out_THD: Tensor, lse_TH: Tensor) -> None:
        """Merge what came back for a round, in place."""
        with self._timer("wait"):
            pending.wait()
        with self._timer("merge"):
            packed = self._returning[turn % 2]
            merge_into(out_THD, lse_TH, packed[..., :-1], packed[..., -1])

    def _allocate(self, q_THD: Tensor) -> None:
        T, H, D = q_THD.shape
        most = self._most_new()
        self._visiting = [q_THD.new_empty(most, H, D) for _ in range(2)]
        self._leaving, self._returning = (
            [q_THD.new_empty(num_queries, H, D + 1, dtype=torch.float32) for _ in range(2)]
            for num_queries in (most, T)
        )
