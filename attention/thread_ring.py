"""A ring whose ranks are threads of one process, over real gloo groups.

The same `ProcessGroupRing` and the same messages as between processes, without
the seconds that processes take to start. Torch's kernels release the GIL, so
the ranks do run at the same time.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist

from attention.ring import MiB, Ring, connect_ring

Result = TypeVar("Result")


class ThreadRanks:
    """N threads, each with its own end of one ring; use as a context manager."""

    def __init__(self, size: int, *, timeout_s: float = 60.0, piece_bytes: int = 64 * MiB) -> None:
        """Start the threads and connect them; ``timeout_s`` bounds every wait for a peer."""
        # One executor a rank: a rank's calls all run on its own thread.
        self._threads = [ThreadPoolExecutor(1, f"rank-{rank}") for rank in range(size)]
        store = dist.HashStore()
        self._rings: list[Ring] = self._on_all(
            lambda rank: connect_ring(
                store,
                rank,
                size,
                torch.device("cpu"),
                timeout_s=timeout_s,
                piece_bytes=piece_bytes,
            )
        )

    def run(self, work: Callable[[Ring], Result]) -> list[Result]:
        """Call ``work(ring)`` on every rank at once; return the results in order of rank.

        Raises:
            Exception: The first error of a rank, after all ranks have ended.
        """
        return self._on_all(lambda rank: work(self._rings[rank]))

    def _on_all(self, work: Callable[[int], Result]) -> list[Result]:
        futures = [thread.submit(work, rank) for rank, thread in enumerate(self._threads)]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]

    def __enter__(self) -> "ThreadRanks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for thread in self._threads:
            thread.shutdown()
