"""For whom each rank waited.

All ranks make the same calls of the ring in the same order, so the k-th transfer
of a step is the same one on every rank. A rank that waits in it waits first for
the peer that comes to it last, and then for the transfer itself. But the peer
may be late because it waited for somebody, too: that part of the wait is due to
whom the peer waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attention.spans import TRANSFER_KINDS, StepSpans


@dataclass(frozen=True)
class _Wait:
    start_s: float
    end_s: float
    cause: int  # a rank; the number of ranks for the transfer itself


def waited_for(spans: Sequence[StepSpans]) -> npt.NDArray[np.float64]:
    """Return ``[N, N + 1]``: the seconds for which rank i waited for rank j.

    The last column is the time for which the message itself was under way. A
    rank waits for itself where the others are late because it was.
    """
    num_ranks = len(spans)
    transfers = [of_rank.transfers.tolist() for of_rank in spans]
    waits: list[list[_Wait]] = [[] for _ in spans]
    # Ranks whose recording was cut have fewer.
    for of_ranks in zip(*transfers, strict=False):
        posted_s = [row[6] for row in of_ranks]
        for rank, (kind, _, to, source, *_, start_s, end_s) in enumerate(of_ranks):
            peers = [*range(num_ranks)]
            if TRANSFER_KINDS[kind] == "exchange":
                peers = [source, to]
            last = max(peers, key=lambda peer: posted_s[peer])
            came_s = min(max(posted_s[last], start_s), end_s)
            if last != rank:
                waits[rank] += _causes(waits[last], last, start_s, came_s)
            waits[rank].append(_Wait(came_s, end_s, num_ranks))
    seconds = np.zeros((num_ranks, num_ranks + 1))
    for rank, of_rank in enumerate(waits):
        for wait in of_rank:
            seconds[rank, wait.cause] += wait.end_s - wait.start_s
    return seconds


def _causes(peers_waits: Sequence[_Wait], peer: int, start_s: float, end_s: float) -> list[_Wait]:
    """Cut a wait for a peer by what the peer itself did meanwhile: it waited, or it was busy."""
    pieces: list[_Wait] = []
    for wait in reversed(peers_waits):
        if wait.end_s <= start_s or end_s <= start_s:
            break
        if wait.start_s >= end_s:
            continue
        if wait.end_s < end_s:
            pieces.append(_Wait(wait.end_s, end_s, peer))
            end_s = wait.end_s
        begin_s = max(start_s, wait.start_s)
        pieces.append(_Wait(begin_s, end_s, wait.cause))
        end_s = begin_s
    if end_s > start_s:
        pieces.append(_Wait(start_s, end_s, peer))
    return pieces[::-1]
