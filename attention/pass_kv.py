"""Ring pass-KV: queries stay, keys and values travel (algorithm 2 of arXiv 2411.01783).

In round j rank k attends to the keys that rank ``s = (k - j) mod N`` computed,
while the next part is in flight: N - 1 transfers in all. With zigzag chunks each
round is one kernel call without a mask tensor:

    s = k   a rank's own chunks in local order: causal
    s < k   both query chunks see the whole first chunk of s and nothing of its second
    s > k   only the second query chunk sees keys, and it sees both chunks of s
"""

from collections.abc import Callable

from torch import Tensor

from attention.kernel import attend
from attention.merge import merge_into
from attention.ring import Ring
from attention.timing import PartTimer
from attention.zigzag import Zigzag


class PassKVAttention:
    """Exact causal attention among the new tokens of one sequence, layer after layer.

    One object serves all layers of a step; it keeps two buffers for arriving
    keys, so a rank needs its own share of a layer's keys and two more.
    """

    def __init__(
        self,
        zigzag: Zigzag,
        ring: Ring,
        timer: PartTimer,
        *,
        scale: float | None = None,
        on_round: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the cut of the tokens; ``on_round`` is called after every round of a layer."""
        self._zigzag = zigzag
        self._ring = ring
        self._timer = timer
        self._scale = scale
        self._on_round = on_round
        self._buffers: list[Tensor] = []

    def __call__(self, q_THD: Tensor, kv_TJD: Tensor) -> Tensor:
        """Return ``out_THD``, float32, for this rank's queries.

        ``kv_TJD``, contiguous, holds this rank's keys' heads, then its values'
        heads. Every rank of the ring must make this call.
        """
        ring, timer = self._ring, self._timer
        part_SJD, part_rank = kv_TJD, ring.rank
        for transfer in range(ring.size):
            pending = None
            if transfer < ring.size - 1:
                source = (part_rank - 1) % ring.size
                incoming_SJD = self._buffer(transfer % 2, kv_TJD)[: self._zigzag.count(source)]
                with timer("exchange"):
                    pending = ring.exchange(part_SJD, incoming_SJD)
            if part_rank == ring.rank:
                with timer("attention"):
                    k_SKD, v_SKD = part_SJD.chunk(2, dim=1)
                    out_THD, lse_TH = attend(q_THD, k_SKD, v_SKD, causal=True, scale=self._scale)
            else:
                self._attend_remote(q_THD, part_SJD, part_rank, out_THD, lse_TH)
            if pending is not None:
                with timer("wait"):
                    pending.wait()
                part_SJD, part_rank = incoming_SJD, source
            self._on_round()
        return out_THD

    def _attend_remote(
        self, q_THD: Tensor, part_SJD: Tensor, part_rank: int, out_THD: Tensor, lse_TH: Tensor
    ) -> None:
        """Attend to another rank's keys and merge, in place."""
        first_row, num_keys = 0, part_SJD.shape[0]
        if part_rank < self._ring.rank:
            num_keys = self._zigzag.lengths(part_rank)[0]
        else:
            first_row = self._zigzag.lengths(self._ring.rank)[0]
        with self._timer("attention"):
            k_SKD, v_SKD = part_SJD[:num_keys].chunk(2, dim=1)
            partial = attend(q_THD[first_row:], k_SKD, v_SKD, scale=self._scale)
        with self._timer("merge"):
            merge_into(out_THD[first_row:], lse_TH[first_row:], *partial)

    def _buffer(self, index: int, like_TJD: Tensor) -> Tensor:
        """One of the two buffers for arriving keys; while one is sent on, the other fills."""
        if not self._buffers:
            longest = max(self._zigzag.count(rank) for rank in range(self._ring.size))
            shape = (longest, *like_TJD.shape[1:])
            self._buffers = [like_TJD.new_empty(shape) for _ in range(min(2, self._ring.size - 1))]
        return self._buffers[index]
