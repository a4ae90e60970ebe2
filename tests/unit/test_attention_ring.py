"""One conformance suite for every implementation of `Ring`; see tests/ring_conformance.py."""

import functools
import re
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from attention import ProcessGroupRing, Ring, ThreadRanks
from attention.ring import connect_ring
from attention.spans import SpanRecorder
from attention.traced_ring import TracedRing
from tests.process_ranks import ProcessRanks, exchange_until_peer_is_lost, leave
from tests.ring_conformance import COLLECTIVE_CHECKS, EXCHANGE_CHECKS, PIECE_BYTES, Check
from tests.staged_ring import StagedRing

CPU = torch.device("cpu")
all_checks = pytest.mark.parametrize(
    "check", [*EXCHANGE_CHECKS, *COLLECTIVE_CHECKS], ids=lambda check: check.__name__
)


@pytest.fixture(scope="module", params=[2, 3, 4])
def thread_ranks(request: pytest.FixtureRequest) -> Iterator[ThreadRanks]:
    with ThreadRanks(request.param, piece_bytes=PIECE_BYTES) as ranks:
        yield ranks


@pytest.fixture(scope="module", params=[2, 3])
def process_ranks(request: pytest.FixtureRequest) -> Iterator[ProcessRanks]:
    with ProcessRanks(request.param) as ranks:
        yield ranks


@all_checks
def test_ring_of_threads_conforms(thread_ranks: ThreadRanks, check: Check) -> None:
    """Tests of attention and of the cluster stand on this ring."""
    thread_ranks.run(lambda ring: check(ring, CPU))


@all_checks
def test_ring_by_way_of_the_host_conforms(thread_ranks: ThreadRanks, check: Check) -> None:
    """Tests of several ranks on one GPU stand on this ring."""
    thread_ranks.run(lambda ring: check(StagedRing(ring), CPU))


@all_checks
def test_traced_ring_conforms(thread_ranks: ThreadRanks, check: Check) -> None:
    """A cluster runs on this ring while a trace is recorded; a full recorder changes nothing."""
    thread_ranks.run(lambda ring: check(TracedRing(ring, SpanRecorder(CPU, 8)), CPU))


@all_checks
def test_ring_of_processes_conforms(process_ranks: ProcessRanks, check: Check) -> None:
    """A cluster on CPU runs like this."""
    process_ranks.run(check)


@pytest.mark.parametrize("check", COLLECTIVE_CHECKS, ids=lambda check: check.__name__)
def test_ring_of_one_conforms(check: Check) -> None:
    """One rank is a cluster too: the same calls, no peer."""
    with ThreadRanks(1) as ranks:
        ranks.run(lambda ring: check(ring, CPU))


def test_ranks_are_numbered_in_order() -> None:
    """Results come in order of rank, and each ring knows its own number and the size."""
    with ThreadRanks(3) as ranks:
        assert ranks.run(lambda ring: (ring.rank, ring.size)) == [(0, 3), (1, 3), (2, 3)]


def test_error_of_a_rank_reaches_the_caller() -> None:
    """A failed check in a thread must fail the test."""

    def fail_on_last(ring: Ring) -> int:
        if ring.rank == 1:
            raise KeyError("rank 1")
        return ring.rank

    with ThreadRanks(2) as ranks, pytest.raises(KeyError, match="rank 1"):
        ranks.run(fail_on_last)


def test_wait_for_a_silent_peer_is_bounded() -> None:
    """A peer that hangs without dying is given up after the ring's time."""

    def exchange_alone(ring: Ring) -> float:
        if ring.rank == 1:
            return 0.0
        start_s = time.monotonic()
        with pytest.raises(RuntimeError):
            ring.exchange(torch.zeros(4), torch.empty(4)).wait()
        return time.monotonic() - start_s

    with ThreadRanks(2, timeout_s=1.0) as ranks:
        waited_s, _ = ranks.run(exchange_alone)

    assert 0.5 < waited_s < 20.0


def test_rank_that_does_not_come_is_given_up() -> None:
    """A cluster whose rank died while loading says so, and does not wait for ever."""
    start_s = time.monotonic()
    with pytest.raises(RuntimeError):
        connect_ring(dist.HashStore(), 0, 2, CPU, timeout_s=1.0)
    assert time.monotonic() - start_s < 20.0


class RecordingGroup:
    """The calls of an NCCL group that an exchange makes, with a backend's signatures."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 3

    def _start_coalescing(self) -> None:
        self.calls.append(("start",))

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> None:
        self.calls.append(("send", tensors[0].tolist(), to))

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> None:
        self.calls.append(("recv", tensors[0].tolist(), source))

    def _end_coalescing(self) -> "RecordingGroup":
        self.calls.append(("end",))
        return self

    def wait(self) -> None:
        self.calls.append(("wait",))


def test_exchange_on_cuda_is_one_group_of_pieces() -> None:
    """Sends and receives of all ranks start together; one side may be empty."""
    group = RecordingGroup()
    ring = ProcessGroupRing(group, torch.device("cuda"), piece_bytes=8)

    ring.exchange(torch.tensor([1.0, 2.0, 3.0]), torch.empty(0)).wait()

    sends: list[tuple[object, ...]] = [("send", [1.0, 2.0], 1), ("send", [3.0], 1)]
    assert group.calls == [("start",), *sends, ("end",), ("wait",)]


def test_exchange_of_nothing_on_cuda_makes_no_call() -> None:
    """An empty NCCL group gives no work, so there would be nothing to wait for."""
    group = RecordingGroup()

    ProcessGroupRing(group, torch.device("cuda"), 8).exchange(torch.empty(0), torch.empty(0)).wait()

    assert group.calls == []


def test_backends_group_calls_take_no_device() -> None:
    """A process group's do, a backend's do not, and ours is a backend."""
    for name in ("_start_coalescing", "_end_coalescing"):
        (signature,) = re.findall(rf"{name}\((.*)\)", getattr(dist.ProcessGroupGloo, name).__doc__)
        assert "," not in signature


@pytest.mark.parametrize("after_s", [(0.0, 0.0, 0.0), (0.0, 0.5, 1.0), (1.0, 0.5, 0.0)], ids=str)
def test_both_neighbours_notice_a_dead_rank(after_s: tuple[float, float, float]) -> None:
    """A dead process closes its connections: no neighbour waits for the ring's full time.

    In a ring of three, rank 2 receives from the dead rank 1 and rank 0 sends to it. Either may
    begin before it dies, and the other after.
    """
    exchange = exchange_until_peer_is_lost
    with ProcessRanks(3, timeout_s=600.0) as ranks:
        start_s = time.monotonic()
        ranks.run(
            functools.partial(exchange, after_s=after_s[0]),
            functools.partial(leave, after_s=after_s[1]),
            functools.partial(exchange, after_s=after_s[2]),
        )
        assert time.monotonic() - start_s < 30.0
