"""Attention of one step as the decoder calls it, layer by layer: store new rows, then attend."""

import torch
from torch import Tensor

from attention import PassKVAttention, Ring, merge_stacked
from attention.timing import PartTimer
from models.page_pool import PagePool


class PrefillAttention:
    """A prompt's new tokens, sharded over the ring: their KV stays here, attention goes around.

    Where only the last token's output is wanted, no other query of the last layer
    matters: that one goes to all ranks, which attend to what they hold, as in decode.
    """

    def __init__(
        self,
        sequence_id: int,
        pool: PagePool,
        ring: Ring,
        around_ring: PassKVAttention,
        timer: PartTimer,
        *,
        last_layer: int | None,
        query_rank: int = 0,
    ) -> None:
        """Take the pool, grown already by this rank's new rows, and the ring's attention.

        ``last_layer`` is the layer whose only query is the last token's, which rank
        ``query_rank`` holds; None where every row's output is wanted.
        """
        self._sequence_id = sequence_id
        self._pool = pool
        self._ring = ring
        self._around_ring = around_ring
        self._timer = timer
        self._last_layer = last_layer
        self._query_rank = query_rank

    def __call__(self, layer: int, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
        """See `models.decoder.LayerAttention`."""
        with self._timer("store"):
            first_row = self._pool.run(self._sequence_id).num_rows - kv_TJD.shape[0]
            self._pool.store(layer, self._sequence_id, first_row, kv_TJD)
        if layer != self._last_layer:
            return self._around_ring(q_THD, kv_TJD)
        holds_query = self._ring.rank == self._query_rank
        q_1HD = q_THD.contiguous() if holds_query else q_THD.new_empty(1, *q_THD.shape[1:])
        if self._ring.size > 1:
            with self._timer("exchange"):
                self._ring.broadcast(q_1HD, self._query_rank)
        out_1HD = attend_to_all_runs(
            layer, self._sequence_id, q_1HD, self._pool, self._ring, self._timer
        )
        return out_1HD if holds_query else out_1HD[:0]


class DecodeAttention:
    """One new token that every rank computes; one rank keeps its KV, all attend to theirs."""

    def __init__(
        self, sequence_id: int, pool: PagePool, ring: Ring, timer: PartTimer, *, keeps_kv: bool
    ) -> None:
        """Take the pool, grown by one row on the rank that ``keeps_kv``."""
        self._sequence_id = sequence_id
        self._pool = pool
        self._ring = ring
        self._timer = timer
        self._keeps_kv = keeps_kv

    def __call__(self, layer: int, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
        """See `models.decoder.LayerAttention`."""
        if self._keeps_kv:
            with self._timer("store"):
                row = self._pool.run(self._sequence_id).num_rows - 1
                self._pool.store(layer, self._sequence_id, row, kv_TJD)
        return attend_to_all_runs(
            layer, self._sequence_id, q_THD, self._pool, self._ring, self._timer
        )


def attend_to_all_runs(
    layer: int, sequence_id: int, q_THD: Tensor, pool: PagePool, ring: Ring, timer: PartTimer
) -> Tensor:
    """Return ``out_THD``, float32, of queries that see all rows of a sequence, on every rank.

    All ranks have the same queries. One packed exchange of (out, lse) brings the
    partials together; all merge them in the same order and so get the same bits.
    """
    with timer("attention"):
        out_THD, lse_TH = pool.attend(layer, sequence_id, q_THD)
    if ring.size == 1:
        return out_THD
    with timer("exchange"):
        packed = torch.cat([out_THD, lse_TH.unsqueeze(-1)], dim=-1)
        gathered = ring.all_gather(packed)
    with timer("merge"):
        return merge_stacked(gathered[..., :-1], gathered[..., -1])[0]
