"""The ranks of a ring and what they exchange.

`Ring` is what attention needs: pass a tensor to a rank further on while receiving
from one as far back, gather small things from all. One
conformance suite (tests/unit/test_attention_ring.py) runs for every
implementation: over processes, over threads, over NCCL.
"""

import datetime
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

MiB = 2**20


class PendingExchange(Protocol):
    """A SendRecv under way."""

    def wait(self) -> None:
        """Return when what was received can be read and what was sent can be overwritten.

        On CUDA this orders the current stream after the exchange and does not
        block the host.
        """


class Ring(Protocol):
    """Ranks 0..size-1 in a circle. All ranks make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """The number of this rank."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    def exchange(self, outgoing: Tensor, incoming: Tensor, hops: int = 1) -> PendingExchange:
        """Start to send to the rank ``hops`` further on and to receive from as far back.

        By default the next and the previous rank; with negative ``hops`` it goes
        the other way. Both tensors are contiguous and untouched until `wait`.
        ``incoming`` has the shape of what that rank sends (gloo ends the process
        where it has not); either may be empty. Several exchanges may be under way.

        Raises:
            ValueError: ``hops`` lead to this rank itself, as all do in a ring of one.
        """

    def all_gather(self, part: Tensor) -> Tensor:
        """Return every rank's ``part`` stacked in order of rank, ``[N, *part.shape]``."""


class ProcessGroupRing:
    """A `Ring` over one torch.distributed process group, gloo on CPU or NCCL on CUDA.

    The group is an object of its own and not registered as a default group, so
    that a ring can be abandoned and built anew in the same process.
    """

    def __init__(self, group: Any, device: torch.device, piece_bytes: int) -> None:
        """Take a group; a message is cut into pieces of at most ``piece_bytes``."""
        self._group = group
        self._device = device
        self._piece_bytes = piece_bytes
        self.rank: int = group.rank()
        self.size: int = group.size()

    def exchange(self, outgoing: Tensor, incoming: Tensor, hops: int = 1) -> PendingExchange:
        """See `Ring.exchange`."""
        to, source = (self.rank + hops) % self.size, (self.rank - hops) % self.size
        if to == self.rank:
            raise ValueError(f"{hops} hops in a ring of {self.size} lead back to the same rank")
        if self._device.type == "cuda":
            if outgoing.numel() == incoming.numel() == 0:
                return _Works([])  # an empty group has no work to wait for
            # NCCL launches grouped operations together; apart they could wait for each other.
            self._group._start_coalescing()
            for piece in self._pieces(outgoing):
                self._group.send([piece], to, 0)
            for piece in self._pieces(incoming):
                self._group.recv([piece], source, 0)
            return _Works([self._group._end_coalescing()])
        receives = [self._group.recv([piece], source, 0) for piece in self._pieces(incoming)]
        sends = [self._group.send([piece], to, 0) for piece in self._pieces(outgoing)]
        # A rank whose next one has died is told by its sends alone: the one behind, which has
        # noticed too, may never send what this rank receives.
        return _Works([*sends, *receives])

    def all_gather(self, part: Tensor) -> Tensor:
        """See `Ring.all_gather`."""
        gathered = part.new_empty((self.size, *part.shape))
        self._group._allgather_base(gathered.view(-1), part.reshape(-1)).wait()
        return gathered

    def _pieces(self, message: Tensor) -> Iterator[Tensor]:
        if message.numel() == 0:
            return
        yield from message.view(-1).split(max(1, self._piece_bytes // message.element_size()))


class _Works:
    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def connect_ring(
    store: dist.Store,
    rank: int,
    size: int,
    device: torch.device,
    *,
    timeout_s: float,
    piece_bytes: int = 64 * MiB,
) -> ProcessGroupRing:
    """Join a ring; returns when all ``size`` ranks have joined through ``store``.

    Raises:
        RuntimeError: A rank did not come, or (in any later call) a peer was lost
            or did not answer within ``timeout_s``.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    group: dist.ProcessGroupGloo | dist.ProcessGroupNCCL
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(store, rank, size, options)
        group.eager_connect_single_device(device)
    else:
        group = dist.ProcessGroupGloo(store, rank, size, timeout)
    return ProcessGroupRing(group, device, piece_bytes)
