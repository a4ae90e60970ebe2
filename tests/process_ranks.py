"""Ranks of a ring that are real processes, and what they are told to do."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType

import torch
import torch.distributed as dist

from attention.ring import Ring, connect_ring
from tests.nccl_ranks import SHARED_GPU_ENVIRONMENT
from tests.ring_conformance import PIECE_BYTES, Check

START_S = 120.0  # for a process to import torch on a busy machine
ANSWER_S = 60.0


def leave(ring: Ring, device: torch.device, *, after_s: float = 0.0) -> None:
    """End this process as a kill does: nothing is flushed, no peer is told."""
    time.sleep(after_s)
    os._exit(1)


def exchange_until_peer_is_lost(ring: Ring, device: torch.device, *, after_s: float = 0.0) -> None:
    """Exchange until that raises, as it must soon after a neighbour has died."""
    time.sleep(after_s)
    outgoing, incoming = (torch.zeros(400_000, device=device) for _ in range(2))
    for _ in range(100):
        try:
            ring.exchange(outgoing, incoming).wait()
        except RuntimeError:
            return
    raise AssertionError("100 exchanges with a dead neighbour succeeded")


class ProcessRanks:
    """N spawned processes, each with its own end of one ring; use as a context manager."""

    def __init__(self, size: int, device_type: str = "cpu", *, timeout_s: float = 60.0) -> None:
        """Start the processes; they meet in a TCP store of this process."""
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        spawn = multiprocessing.get_context("spawn")
        self._processes = []
        self._pipes: list[Connection] = []
        for rank in range(size):
            pipe, child_pipe = spawn.Pipe()
            process = spawn.Process(
                target=_serve_checks,
                args=(child_pipe, self._store.port, rank, size, device_type, timeout_s),
                daemon=True,
            )
            process.start()
            child_pipe.close()
            self._processes.append(process)
            self._pipes.append(pipe)
        for rank in range(size):
            self._expect_success(rank, START_S)

    def run(self, *checks: Check) -> None:
        """Have rank i run check i, or all of them the only check; raise what a rank raised."""
        for rank, pipe in enumerate(self._pipes):
            pipe.send(checks[rank % len(checks)])
        for rank in range(len(self._pipes)):
            check = checks[rank % len(checks)]
            if getattr(check, "func", check) is not leave:
                self._expect_success(rank, ANSWER_S)

    def _expect_success(self, rank: int, timeout_s: float) -> None:
        if not self._pipes[rank].poll(timeout_s):
            raise AssertionError(f"rank {rank} did not answer within {timeout_s:g} s")
        error = self._pipes[rank].recv()
        assert error is None, f"rank {rank}: {error}"

    def __enter__(self) -> "ProcessRanks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            pipe.close()
            process.kill()
            process.join()


def _serve_checks(
    pipe: Connection, port: int, rank: int, size: int, device_type: str, timeout_s: float
) -> None:
    """Join the ring, say so, and answer every check with None or its traceback."""
    torch.set_num_threads(1)
    with _reporting(pipe):
        device = _own_device(rank, size, device_type)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        ring = connect_ring(store, rank, size, device, timeout_s=timeout_s, piece_bytes=PIECE_BYTES)
    while True:
        try:
            check: Check = pipe.recv()
        except EOFError:
            return
        with _reporting(pipe):
            check(ring, device)


def _own_device(rank: int, size: int, device_type: str) -> torch.device:
    """Return a rank's device; ranks share the GPUs where there are fewer."""
    if device_type != "cuda":
        return torch.device(device_type)
    devices = torch.cuda.device_count()
    if size > devices:
        os.environ.update(SHARED_GPU_ENVIRONMENT)
    torch.cuda.set_device(rank % devices)
    return torch.device("cuda", rank % devices)


@contextmanager
def _reporting(pipe: Connection) -> Iterator[None]:
    try:
        yield
    except Exception:
        pipe.send(traceback.format_exc())
    else:
        pipe.send(None)
