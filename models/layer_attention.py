"""Attention of one step as the decoder calls it, layer by layer: store new rows, then attend."""

import torch
from torch import Tensor

from attention import PassKVAttention, Ring, merge_stacked
from attention.timing import PartTimer
from models.page_pool import PagePool


class PrefillAttention:
    """A prompt's new tokens, sharded over the ring: their KV stays here, attention goes around."""

    def __init__(
        self, sequence_id: int, pool: PagePool, around_ring: PassKVAttention, timer: PartTimer
    ) -> None:
        """Take the pool, grown already by this rank's new rows, and the ring's attention."""
        self._sequence_id = sequence_id
        self._pool = pool
        self._around_ring = around_ring
        self._timer = timer

    def __call__(self, layer: int, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
        """See `models.decoder.LayerAttention`."""
        with self._timer("store"):
            first_row = self._pool.run(self._sequence_id).num_rows - kv_TJD.shape[0]
            self._pool.store(layer, self._sequence_id, first_row, kv_TJD)
        return self._around_ring(q_THD, kv_TJD)


class DecodeAttention:
    """One new token that every rank computes; one rank keeps its KV, all attend to what they hold.

    One packed exchange of (out, lse) a layer brings the partials together; all
    ranks merge them in the same order and so get the same bits.
    """

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
        with self._timer("attention"):
            out_THD, lse_TH = self._pool.attend(layer, self._sequence_id, q_THD)
        if self._ring.size == 1:
            return out_THD
        with self._timer("exchange"):
            packed = torch.cat([out_THD, lse_TH.unsqueeze(-1)], dim=-1)
            gathered = self._ring.all_gather(packed)
        with self._timer("merge"):
            return merge_stacked(gathered[..., :-1], gathered[..., -1])[0]
