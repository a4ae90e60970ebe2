"""Attention of one step as the decoder calls it, layer by layer: store new rows, then attend.

A step has sequences that are sharded over the ring, and sequences that lie whole on this
rank. The rows of the sharded ones come first in every tensor, then those of the whole ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attention import PagedBatch, PagedRows, Ring, attend, merge_into, merge_stacked
from attention.timing import PartTimer
from models.page_pool import PagePool


class RingAttention(Protocol):
    """Attention of sharded sequences: `PassKVAttention` or `PassQAttention`."""

    def __call__(self, q_THD: Tensor, kv_TJD: Tensor, cached: Sequence[PagedRows]) -> Tensor:
        """Return ``out_THD`` in float32."""


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """What one sequence adds to this rank in a step."""

    sequence_id: int
    first_row: int  # of the new ones; as many rows of earlier tokens lie before them
    count: int
    query_rank: int | None = None  # that holds the last token's query, where that is wanted

    @property
    def num_rows(self) -> int:
        """The sequence's rows on this rank, with the new ones."""
        return self.first_row + self.count


class PrefillAttention:
    """New tokens of sequences: their KV stays here, attention goes around the ring.

    Where only the last token's output is wanted, no other query of the last layer
    matters: that one goes to all ranks, which attend to what they hold, as in decode.
    """

    def __init__(
        self,
        sharded: Sequence[NewRows],
        whole: Sequence[NewRows],
        pool: PagePool,
        ring: Ring,
        around_ring: RingAttention | None,
        timer: PartTimer,
        *,
        last_layer: int | None,
        before_layer: Callable[[int], object] = lambda layer: None,
    ) -> None:
        """Take the pool, grown already by this rank's new rows, and the ring's attention.

        ``around_ring`` may be None where nothing is sharded. ``last_layer`` is the layer
        whose only queries are the wanted ones of last tokens; None where every row's
        output is wanted. ``before_layer`` returns when a layer's earlier rows are there.
        """
        self._sharded = sharded
        self._whole = whole
        self._before_layer = before_layer
        self._pool = pool
        self._ring = ring
        self._around_ring = around_ring
        self._timer = timer
        self._last_layer = last_layer

    def __call__(self, layer: int, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
        """See `models.decoder.LayerAttention`."""
        self._before_layer(layer)
        counts = [rows.count for rows in (*self._sharded, *self._whole)]
        with self._timer("store"):
            kv_TJD = self._pool.as_stored(kv_TJD)
            for rows, part_TJD in zip(
                (*self._sharded, *self._whole), kv_TJD.split(counts), strict=True
            ):
                self._pool.store(layer, rows.sequence_id, rows.first_row, part_TJD)
        if layer == self._last_layer:
            return self._attend_last(layer, q_THD)
        ring_rows = sum(rows.count for rows in self._sharded)
        outs = []
        if self._sharded:
            assert self._around_ring is not None
            cached = [
                self._pool.rows(layer, rows.sequence_id, rows.first_row) for rows in self._sharded
            ]
            outs.append(self._around_ring(q_THD[:ring_rows], kv_TJD[:ring_rows], cached))
        own = counts[len(self._sharded) :]
        for rows, q_tHD, new_tJD in zip(
            self._whole, q_THD[ring_rows:].split(own), kv_TJD[ring_rows:].split(own), strict=True
        ):
            outs.append(self._attend_whole(layer, rows, q_tHD, new_tJD))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attend_whole(self, layer: int, rows: NewRows, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
        """Attend to what this rank holds of a sequence, which is all there is."""
        with self._timer("attention"):
            out_THD, lse_TH = attend(q_THD, *kv_TJD.chunk(2, dim=1), causal=True)
        if rows.first_row:
            cached = self._pool.rows(layer, rows.sequence_id, rows.first_row)
            with self._timer("attention"):
                partial = cached.attend(q_THD)
            with self._timer("merge"):
                merge_into(out_THD, lse_TH, *partial)
        return out_THD

    def _attend_last(self, layer: int, q_RHD: Tensor) -> Tensor:
        """Attend with the last tokens' queries alone; those of sharded sequences come first."""
        sharded = [rows for rows in self._sharded if rows.query_rank is not None]
        whole = [rows for rows in self._whole if rows.query_rank is not None]
        outs = []
        if sharded:
            held = [rows.query_rank == self._ring.rank for rows in sharded]
            q_BHD = self._gather_queries(q_RHD[: sum(held)], sharded)
            batch = _batch_of(sharded, self._pool)
            out_BHD = attend_to_all_runs(layer, batch, q_BHD, self._pool, self._ring, self._timer)
            outs.append(out_BHD[held])
            q_RHD = q_RHD[sum(held) :]
        if whole:
            with self._timer("attention"):
                batch = _batch_of(whole, self._pool)
                outs.append(self._pool.attend(layer, batch, q_RHD)[0])
        return torch.cat(outs) if outs else q_RHD.float()

    def _gather_queries(self, own_RHD: Tensor, sharded: Sequence[NewRows]) -> Tensor:
        """Return one query of each sequence on all ranks, of which this rank has some."""
        if self._ring.size == 1:
            return own_RHD
        q_BHD = own_RHD.new_zeros(len(sharded), *own_RHD.shape[1:])
        q_BHD[[rows.query_rank == self._ring.rank for rows in sharded]] = own_RHD
        with self._timer("exchange"):
            q_NBHD = self._ring.all_gather(q_BHD)
        return q_NBHD[[rows.query_rank for rows in sharded], range(len(sharded))]


class DecodeAttention:
    """One new token a sequence; one rank keeps its KV, all that hold rows attend to theirs."""

    def __init__(
        self,
        sharded: Sequence[NewRows],
        whole: Sequence[NewRows],
        pool: PagePool,
        ring: Ring,
        timer: PartTimer,
    ) -> None:
        """Take sequences that all ranks compute, and those of this rank alone.

        ``count`` is 1 where this rank keeps the new token's KV, else 0.
        """
        self._pool = pool
        self._ring = ring
        self._timer = timer
        rows = [*sharded, *whole]
        # What is the same in all layers is worked out once.
        self._sharded = _batch_of(sharded, pool) if sharded else None
        self._whole = _batch_of(whole, pool) if whole else None
        self._num_sharded = len(sharded)
        kept = [number for number, each in enumerate(rows) if each.count]
        self._kept: slice | list[int] = slice(None) if len(kept) == len(rows) else kept
        self._slots = pool.slots([(rows[n].sequence_id, rows[n].first_row) for n in kept])

    def __call__(self, layer: int, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
        """See `models.decoder.LayerAttention`."""
        if len(self._slots):
            with self._timer("store"):
                self._pool.store_at(layer, self._slots, kv_TJD[self._kept])
        outs = []
        if self._sharded is not None:
            q_BHD = q_THD[: self._num_sharded]
            outs.append(
                attend_to_all_runs(layer, self._sharded, q_BHD, self._pool, self._ring, self._timer)
            )
        if self._whole is not None:
            with self._timer("attention"):
                q_BHD = q_THD[self._num_sharded :]
                outs.append(self._pool.attend(layer, self._whole, q_BHD)[0])
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class MixedAttention:
    """A prefill and a decode step in one: the decode rows come last in every tensor."""

    def __init__(
        self, prefill: PrefillAttention, decode: DecodeAttention, num_decoded: int
    ) -> None:
        """Take the two, and how many rows are the decode step's."""
        self._prefill = prefill
        self._decode = decode
        self._num_decoded = num_decoded

    def __call__(self, layer: int, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
        """See `models.decoder.LayerAttention`."""
        n = self._num_decoded
        return torch.cat(
            [
                self._prefill(layer, q_THD[:-n], kv_TJD[:-n]),
                self._decode(layer, q_THD[-n:], kv_TJD[-n:]),
            ]
        )


def attend_to_all_runs(
    layer: int, batch: PagedBatch, q_BHD: Tensor, pool: PagePool, ring: Ring, timer: PartTimer
) -> Tensor:
    """Return ``out_BHD``, float32, of queries that see all rows of their sequence, on every rank.

    All ranks have the same queries. One packed exchange of (out, lse) brings the
    partials together; all merge them in the same order and so get the same bits.
    """
    with timer("attention"):
        out_BHD, lse_BH = pool.attend(layer, batch, q_BHD)
    if ring.size == 1:
        return out_BHD
    with timer("exchange"):
        packed = torch.cat([out_BHD, lse_BH.unsqueeze(-1)], dim=-1)
        gathered = ring.all_gather(packed)
    with timer("merge"):
        return merge_stacked(gathered[..., :-1], gathered[..., -1])[0]


def _batch_of(runs: Sequence[NewRows], pool: PagePool) -> PagedBatch:
    return pool.batch([(rows.sequence_id, rows.num_rows) for rows in runs])
