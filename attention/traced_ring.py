"""A ring that records when each message was posted and when it was seen to have arrived."""

from torch import Tensor

from attention.ring import PendingExchange, Ring
from attention.spans import EVERY_RANK, OpenTransfer, SpanRecorder


class TracedRing:
    """A `Ring` around another one; all that goes through it is recorded.

    The end of a transfer is the moment at which this rank's wait for it was
    over. It may have been complete before, where the rank did not have to wait.
    """

    def __init__(self, ring: Ring, recorder: SpanRecorder) -> None:
        """Take the ring that carries the messages."""
        self._ring = ring
        self._recorder = recorder
        self.rank = ring.rank
        self.size = ring.size

    def exchange(self, outgoing: Tensor, incoming: Tensor, hops: int = 1) -> PendingExchange:
        """See `Ring.exchange`."""
        transfer = self._recorder.post(
            "exchange",
            to=(self.rank + hops) % self.size,
            source=(self.rank - hops) % self.size,
            sent_bytes=outgoing.nbytes,
            received_bytes=incoming.nbytes,
        )
        return _Traced(self._ring.exchange(outgoing, incoming, hops), transfer)

    def all_gather(self, part: Tensor) -> Tensor:
        """See `Ring.all_gather`."""
        others_bytes = part.nbytes * (self.size - 1)
        transfer = self._recorder.post(
            "all_gather",
            to=EVERY_RANK,
            source=EVERY_RANK,
            sent_bytes=others_bytes,
            received_bytes=others_bytes,
        )
        gathered = self._ring.all_gather(part)
        transfer.end()
        return gathered


class _Traced:
    def __init__(self, pending: PendingExchange, transfer: OpenTransfer) -> None:
        self._pending = pending
        self._transfer = transfer

    def wait(self) -> None:
        self._transfer.begin_wait()
        self._pending.wait()
        self._transfer.end()
