"""What a rank records of a step, and how its clock relates to rank 0's."""

import numpy as np
import pytest
import torch
from torch import Tensor

from attention import Ring, ThreadRanks, clocks
from attention.clocks import RankClock, ring_clock
from attention.ring import PendingExchange
from attention.spans import EVERY_RANK, NO_LAYER, TRANSFER_KINDS, SpanRecorder, StepSpans
from attention.timing import PartTimer
from attention.traced_ring import TracedRing

CPU = torch.device("cpu")


def record_step(ring: Ring, max_spans: int = 100) -> StepSpans:
    """A step of one layer: a transfer behind some work, then a token for all."""
    recorder = SpanRecorder(CPU, max_spans)
    timer, traced = PartTimer(CPU, recorder), TracedRing(ring, recorder)
    timer.at_layer(4)
    with timer("exchange"):
        pending = traced.exchange(torch.zeros(10), torch.empty(10))
    with timer("attention"):
        torch.zeros(100).sum()
    with timer("wait"):
        pending.wait()
    timer.at_layer(NO_LAYER)
    with timer("exchange"):
        traced.all_gather(torch.zeros(3))
    return recorder.take(0.0, 1e12)


def test_parts_and_transfers_are_recorded_in_order() -> None:
    """Each part with its layer; each message from the post to its end, with bytes and peers."""
    with ThreadRanks(3) as ranks:
        spans = ranks.run(record_step)[1]

    names = [spans.part_names[index] for index in spans.parts["part"]]
    assert names == ["exchange", "attention", "wait", "exchange"]
    assert spans.parts["layer"].tolist() == [4, 4, 4, NO_LAYER]
    assert spans.parts["sent_bytes"].tolist() == [40, 0, 0, 2 * 12]
    assert spans.parts["to"][0] == 2
    moments_s = np.stack([spans.parts["start_s"], spans.parts["end_s"]], axis=1).ravel()
    assert (np.diff(moments_s) >= 0.0).all()
    kinds = [TRANSFER_KINDS[kind] for kind in spans.transfers["kind"]]
    assert kinds == ["exchange", "all_gather"]
    assert spans.transfers["to"].tolist() == [2, EVERY_RANK]
    assert spans.transfers["source"].tolist() == [0, EVERY_RANK]
    assert spans.transfers["received_bytes"].tolist() == [40, 24]
    assert (spans.transfers["posted_s"] <= spans.transfers["wait_s"]).all()
    assert (spans.transfers["wait_s"] <= spans.transfers["end_s"]).all()
    # The wait of the transfer is the part of this name.
    assert spans.parts["start_s"][2] <= spans.transfers["wait_s"][0]
    assert spans.transfers["end_s"][0] <= spans.parts["end_s"][2]
    assert not spans.is_cut


def test_full_recorder_says_so() -> None:
    """A long trace must not fill memory."""
    with ThreadRanks(2) as ranks:
        spans = ranks.run(lambda ring: record_step(ring, max_spans=3))[0]

    assert len(spans.parts) + len(spans.transfers) == 3
    assert spans.is_cut


def test_a_step_begins_empty() -> None:
    """What a step left behind does not show in the next one."""
    recorder = SpanRecorder(CPU, 10)
    with PartTimer(CPU, recorder)("gemm"):
        pass
    PartTimer(CPU, recorder)

    assert len(recorder.take(0.0, 1.0).parts) == 0


class CountingEvent:
    """A CUDA event that happens a millisecond after the one recorded before it."""

    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.number = 0

    def record(self) -> None:
        CountingEvent.recorded += 1
        self.number = CountingEvent.recorded

    def elapsed_time(self, later: "CountingEvent") -> float:
        return float(later.number - self.number)


def test_events_become_seconds_of_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the step begins with one moment that is known on both clocks."""
    monkeypatch.setattr(torch.cuda, "Event", CountingEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("time.perf_counter", lambda: 50.0)
    ring, cuda = HoppingRing(), torch.device("cuda")
    recorder = SpanRecorder(cuda, 10)
    timer = PartTimer(cuda, recorder)
    with timer("exchange"):
        pending = TracedRing(ring, recorder).exchange(torch.zeros(1), torch.zeros(1))
    with timer("wait"):
        pending.wait()

    assert timer.seconds() == pytest.approx({"exchange": 0.002, "wait": 0.003})
    spans = recorder.take(50.0, 50.008)
    assert spans.parts["start_s"].tolist() == pytest.approx([50.001, 50.004])
    assert spans.parts["end_s"].tolist() == pytest.approx([50.003, 50.007])
    assert [spans.transfers[name][0] for name in ("posted_s", "wait_s", "end_s")] == (
        pytest.approx([50.002, 50.005, 50.006])
    )


class HoppingRing:
    """Only tells how it was called."""

    rank, size = 3, 4

    def __init__(self) -> None:
        self.calls: list[int] = []

    def exchange(self, outgoing: Tensor, incoming: Tensor, hops: int = 1) -> PendingExchange:
        self.calls.append(hops)
        return self

    def wait(self) -> None:
        """Nothing is under way."""

    def all_gather(self, part: Tensor) -> Tensor:
        return part


def test_hops_are_passed_on() -> None:
    """A message to the rank after the next one is recorded with these peers."""
    ring, recorder = HoppingRing(), SpanRecorder(CPU, 10)
    traced = TracedRing(ring, recorder)

    traced.exchange(torch.zeros(1), torch.zeros(1)).wait()
    traced.exchange(torch.zeros(1), torch.zeros(1), hops=2).wait()

    transfers = recorder.take(0.0, 1.0).transfers
    assert ring.calls == [1, 2]
    assert transfers["to"].tolist() == [0, 1]
    assert transfers["source"].tolist() == [2, 1]


def test_ranks_of_one_host_share_a_clock() -> None:
    """Their offset is known to be zero."""
    with ThreadRanks(2) as ranks:
        rank_clocks = ranks.run(lambda ring: ring_clock(ring, CPU))

    assert [clock.offset_s for clock in rank_clocks] == [0.0, 0.0]
    assert rank_clocks[0].boot_id == rank_clocks[1].boot_id


def test_other_hosts_clock_is_found_over_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is the same clock under another name: what is found is the method's error."""
    boot_ids = iter(range(100, 103))
    monkeypatch.setattr(clocks, "boot_id", lambda: next(boot_ids))
    with ThreadRanks(3) as ranks:
        rank_clocks = ranks.run(lambda ring: ring_clock(ring, CPU))

    assert rank_clocks[0] == RankClock(rank_clocks[0].boot_id, offset_s=0.0, error_s=0.0)
    for clock in rank_clocks[1:]:
        assert 0.0 <= abs(clock.offset_s) <= clock.error_s
        assert clock.error_s < 0.1  # on a busy machine; some 0.1 ms on an idle one
