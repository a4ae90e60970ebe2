"""What every implementation of `Ring` must do, and ranks that are real processes to do it in.

Each check is a function ``(ring, device)`` that all ranks of a ring call at
once, so that one suite serves threads, processes and CUDA. Rings under test
should cut messages at `PIECE_BYTES`: some messages here are shorter and some
longer. A ring of one rank exchanges with nobody, so only `COLLECTIVE_CHECKS`
apply to it.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from attention.ring import Ring, connect_ring
from tests.nccl_ranks import SHARED_GPU_ENVIRONMENT

Check = Callable[[Ring, torch.device], None]

PIECE_BYTES = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
START_S = 120.0  # for a process to import torch on a busy machine
ANSWER_S = 60.0


def message(
    sender: int, length: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return numbers that differ by sender and place and are exact in every dtype."""
    return ((torch.arange(length) * 7 + sender * 31) % 251).to(device, dtype)


def neighbours(ring: Ring) -> tuple[int, int]:
    """Return the previous and the next rank."""
    return (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size


def check_exchange_rotates(ring: Ring, device: torch.device) -> None:
    """A rank sends to the next and receives from the previous: after N turns all is at home."""
    travelling = message(ring.rank, 5, device)
    for turn in range(1, ring.size + 1):
        incoming = torch.full_like(travelling, -1.0)
        ring.exchange(travelling, incoming).wait()
        assert torch.equal(incoming, message((ring.rank - turn) % ring.size, 5, device))
        travelling = incoming


def check_exchange_of_unequal_sizes(ring: Ring, device: torch.device) -> None:
    """Shares differ by rank, and the share of rank 0 here is empty."""
    previous, _ = neighbours(ring)
    incoming = torch.full((3 * previous, 2), -1.0, device=device)
    ring.exchange(message(ring.rank, 6 * ring.rank, device).view(-1, 2), incoming).wait()
    assert torch.equal(incoming, message(previous, 6 * previous, device).view(-1, 2))


def check_exchange_of_nothing(ring: Ring, device: torch.device) -> None:
    """A chunk that is empty on all ranks neither blocks nor shifts what comes after it."""
    previous, _ = neighbours(ring)
    empty = torch.empty(0, 4, device=device)
    ring.exchange(empty, torch.empty_like(empty)).wait()
    incoming = torch.full((3,), -1.0, device=device)
    ring.exchange(message(ring.rank, 3, device), incoming).wait()
    assert torch.equal(incoming, message(previous, 3, device))


def check_long_messages_arrive_whole(ring: Ring, device: torch.device) -> None:
    """Pieces arrive in order, a last piece that is not full included; so does one exact piece."""
    previous, _ = neighbours(ring)
    for length in (PIECE_BYTES // 4, PIECE_BYTES // 4 + 1, 10_001):
        incoming = torch.full((length,), -1.0, device=device)
        ring.exchange(message(ring.rank, length, device), incoming).wait()
        assert torch.equal(incoming, message(previous, length, device))


def check_pending_exchanges_keep_their_order(ring: Ring, device: torch.device) -> None:
    """Several exchanges may be under way; each gets its own message, whichever is awaited first."""
    previous, _ = neighbours(ring)
    lengths = (3, 2_000, 1, 1_500)
    outgoing = [message(ring.rank + 10 * i, n, device) for i, n in enumerate(lengths)]
    incoming = [torch.full((n,), -1.0, device=device) for n in lengths]
    pending = [ring.exchange(out, into) for out, into in zip(outgoing, incoming, strict=True)]
    for exchange in reversed(pending):
        exchange.wait()
    for i, length in enumerate(lengths):
        assert torch.equal(incoming[i], message(previous + 10 * i, length, device))


def check_buffers_may_be_reused_after_wait(ring: Ring, device: torch.device) -> None:
    """What was sent may be overwritten after `wait`, though the peer reads it late.

    The message is larger than the sockets' buffers, so that a late reader does
    leave some of it with the sender.
    """
    previous, _ = neighbours(ring)
    outgoing, incoming = (torch.empty(400_000, device=device) for _ in range(2))
    for turn in range(3):
        outgoing.fill_(100.0 * turn + ring.rank)
        if turn % ring.size == ring.rank:
            time.sleep(0.1)
        ring.exchange(outgoing, incoming).wait()
        outgoing.fill_(-1.0)
        assert torch.equal(incoming, torch.full_like(incoming, 100.0 * turn + previous))


def check_exchange_of_every_dtype(ring: Ring, device: torch.device) -> None:
    """KV travels in the model's dtype; no bit may change."""
    previous, _ = neighbours(ring)
    for dtype in DTYPES:
        for length in (9, 5_000):
            incoming = torch.zeros(length, dtype=dtype, device=device)
            ring.exchange(message(ring.rank, length, device, dtype), incoming).wait()
            assert torch.equal(incoming, message(previous, length, device, dtype))


def check_exchange_of_a_slice(ring: Ring, device: torch.device) -> None:
    """The buffer for arriving keys is as long as the longest part; the rest is not written."""
    previous, _ = neighbours(ring)
    buffer = torch.full((10, 2, 3), -1.0, device=device)
    ring.exchange(message(ring.rank, 24, device).view(4, 2, 3), buffer[:4]).wait()
    assert torch.equal(buffer[:4], message(previous, 24, device).view(4, 2, 3))
    assert bool((buffer[4:] == -1.0).all())


def check_all_gather_stacks_by_rank(ring: Ring, device: torch.device) -> None:
    """All ranks get the same stack in order of rank, so that all merge to the same bits."""
    for dtype in DTYPES:
        gathered = ring.all_gather(message(ring.rank, 12, device, dtype).view(3, 4))
        parts = [message(rank, 12, device, dtype).view(3, 4) for rank in range(ring.size)]
        assert torch.equal(gathered, torch.stack(parts))


def check_all_gather_of_a_view(ring: Ring, device: torch.device) -> None:
    """A part need not be contiguous: kernels return transposed results."""
    gathered = ring.all_gather(message(ring.rank, 12, device).view(3, 4).t())
    for rank in range(ring.size):
        assert torch.equal(gathered[rank], message(rank, 12, device).view(3, 4).t())


def check_broadcast_from_each_rank(ring: Ring, device: torch.device) -> None:
    """The sampled token reaches all ranks from whichever sampled it."""
    for dtype in DTYPES:
        for source in range(ring.size):
            value = message(ring.rank, 3, device, dtype)
            ring.broadcast(value, source)
            assert torch.equal(value, message(source, 3, device, dtype))


def check_calls_may_be_mixed(ring: Ring, device: torch.device) -> None:
    """A decode step gathers and then broadcasts, a prefill exchanges: nothing gets crossed."""
    previous, _ = neighbours(ring)
    for turn in range(5):
        gathered = ring.all_gather(message(ring.rank + turn, 4, device))
        token = message(ring.rank + turn, 1, device, torch.int64)
        ring.broadcast(token, turn % ring.size)
        incoming = torch.full((4,), -1.0, device=device)
        if ring.size > 1:
            ring.exchange(message(ring.rank + turn, 4, device), incoming).wait()
            assert torch.equal(incoming, message(previous + turn, 4, device))
        assert torch.equal(gathered[-1], message(ring.size - 1 + turn, 4, device))
        assert torch.equal(token, message(turn % ring.size + turn, 1, device, torch.int64))


EXCHANGE_CHECKS: tuple[Check, ...] = (
    check_exchange_rotates,
    check_exchange_of_unequal_sizes,
    check_exchange_of_nothing,
    check_long_messages_arrive_whole,
    check_pending_exchanges_keep_their_order,
    check_buffers_may_be_reused_after_wait,
    check_exchange_of_every_dtype,
    check_exchange_of_a_slice,
)
COLLECTIVE_CHECKS: tuple[Check, ...] = (
    check_all_gather_stacks_by_rank,
    check_all_gather_of_a_view,
    check_broadcast_from_each_rank,
    check_calls_may_be_mixed,
)


def leave(ring: Ring, device: torch.device) -> None:
    """End this process as a kill does: nothing is flushed, no peer is told."""
    os._exit(1)


def exchange_until_peer_is_lost(ring: Ring, device: torch.device) -> None:
    """Exchange until that raises, as it must soon after a neighbour has died."""
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
            if checks[rank % len(checks)] is not leave:
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
