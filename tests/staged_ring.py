"""A ring for tensors of any device over one that carries CPU tensors.

With it, ranks that are threads of one process share one GPU: their kernels are
the real ones, and what travels goes by way of the host.
"""

import torch
from torch import Tensor

from attention.ring import PendingExchange, Ring


class StagedRing:
    """A `Ring` whose messages are copied to the host before they travel, and back after."""

    def __init__(self, ring: Ring) -> None:
        """Take a ring of CPU tensors."""
        self._ring = ring
        self.rank = ring.rank
        self.size = ring.size

    def exchange(self, outgoing: Tensor, incoming: Tensor, hops: int = 1) -> PendingExchange:
        """See `Ring.exchange`."""
        arriving = torch.empty_like(incoming, device="cpu")
        pending = self._ring.exchange(outgoing.cpu(), arriving, hops)
        return _Staged(pending, arriving, incoming)

    def all_gather(self, part: Tensor) -> Tensor:
        """See `Ring.all_gather`."""
        return self._ring.all_gather(part.cpu()).to(part.device)


class _Staged:
    def __init__(self, pending: PendingExchange, arriving: Tensor, incoming: Tensor) -> None:
        self._pending = pending
        self._arriving = arriving
        self._incoming = incoming

    def wait(self) -> None:
        self._pending.wait()
        self._incoming.copy_(self._arriving)
