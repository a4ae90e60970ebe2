"""Spans of all ranks become rows of a trace viewer, and name the rank that was late."""

import dataclasses
import itertools
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.errors import TraceError
from actors.records import StepRecord
from actors.timeline import TracedStep, chrome_trace
from actors.trace import Trace
from actors.trace_summary import TraceSummary, summarise
from actors.waits import waited_for
from attention import Ring, ThreadRanks
from attention.clocks import RankClock
from attention.spans import (
    EVERY_RANK,
    PART_ROW,
    TRANSFER_KINDS,
    TRANSFER_ROW,
    SpanRecorder,
    StepSpans,
)
from attention.traced_ring import TracedRing

CPU = torch.device("cpu")
PARTS = ("attention", "exchange", "wait")
BYTES = 1_000_000
BEGAN_S = 100.0  # a clock does not begin with the trace


class SyntheticRank:
    """Writes the spans of one rank down as they would have been recorded."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.now_s = BEGAN_S
        self.parts: list[tuple[Any, ...]] = []
        self.transfers: list[tuple[Any, ...]] = []

    def work(self, layer: int, seconds: float) -> None:
        self.parts.append((0, layer, -1, 0, self.now_s, self.now_s + seconds))
        self.now_s += seconds

    def wait(self, kind: str, layer: int, posted_s: float, end_s: float, source: int) -> None:
        """Wait from now to ``end_s`` for what was posted before."""
        to = (self.rank + 1) % self.num_ranks if kind == "exchange" else EVERY_RANK
        end_s = max(end_s, self.now_s)
        index = TRANSFER_KINDS.index(kind)
        row = (index, layer, to, source, BYTES, BYTES, posted_s, self.now_s, end_s)
        self.transfers.append(row)
        self.parts.append((2, layer, -1, 0, self.now_s, end_s))
        self.now_s = end_s

    def spans(self) -> StepSpans:
        parts = np.array(self.parts, dtype=PART_ROW)
        transfers = np.array(self.transfers, dtype=TRANSFER_ROW)
        return StepSpans(PARTS, parts, transfers, BEGAN_S, self.now_s, is_cut=False)


def gathers(work_s: list[list[float]], message_s: float = 0.001) -> tuple[StepSpans, ...]:
    """Layers of work, each followed by an all_gather; ``work_s`` is of rank and layer."""
    ranks = [SyntheticRank(rank, len(work_s)) for rank in range(len(work_s))]
    for layer in range(len(work_s[0])):
        for rank in ranks:
            rank.work(layer, work_s[rank.rank][layer])
        last_s = max(rank.now_s for rank in ranks)
        for rank in ranks:
            rank.wait("all_gather", layer, rank.now_s, last_s + message_s, EVERY_RANK)
    return tuple(rank.spans() for rank in ranks)


def exchanges(work_s: list[list[float]], message_s: float = 0.001) -> tuple[StepSpans, ...]:
    """Rounds of a ring: a rank posts, works, and waits for what the previous rank posted."""
    ranks = [SyntheticRank(rank, len(work_s)) for rank in range(len(work_s))]
    for turn in range(len(work_s[0])):
        posted_s = [rank.now_s for rank in ranks]
        for rank in ranks:
            rank.work(turn, work_s[rank.rank][turn])
        for rank in ranks:
            source = (rank.rank - 1) % len(ranks)
            ready_s = max(posted_s[source], posted_s[rank.rank]) + message_s
            rank.wait("exchange", turn, posted_s[rank.rank], ready_s, source)
    return tuple(rank.spans() for rank in ranks)


def traced_step(spans: tuple[StepSpans, ...], number: int = 0) -> TracedStep:
    walls_s = tuple(of_rank.end_s - of_rank.start_s for of_rank in spans)
    record = StepRecord(
        number=number,
        phase="prefill",
        sequence_ids=(1,),
        prefill_tokens=64,
        decode_tokens=0,
        cached_tokens=0,
        algorithm="pass_kv",
        num_ranks=len(spans),
        predicted_s=None,
        prices_s={},
        plan_s=0.0,
        wall_s=max(walls_s) + 0.002,
        ranks_wall_s=walls_s,
        ranks_parts_s=tuple({"attention": 0.1} for _ in spans),
    )
    return TracedStep(record=record, start_s=BEGAN_S - 0.001, spans=spans)


def summary_of(*steps: tuple[StepSpans, ...]) -> TraceSummary:
    hosts = [f"host-{rank}" for rank in range(len(steps[0]))]
    return summarise(hosts, [traced_step(spans, i) for i, spans in enumerate(steps)])


def test_late_rank_is_found_at_an_all_gather() -> None:
    """The others came 30 and 40 ms before it; the message itself is nobody's fault."""
    seconds = waited_for(gathers([[0.02], [0.05], [0.01]]))

    expected = np.array([[0, 0.03, 0, 0.001], [0, 0, 0, 0.001], [0, 0.04, 0, 0.001]])
    np.testing.assert_allclose(seconds, expected, atol=1e-9)


def test_lateness_that_is_handed_on_belongs_to_its_cause() -> None:
    """Rank 0 is late once; in a ring its neighbour is late a round later, and so on."""
    busy_s = [[0.1, 0.01, 0.01, 0.01]] + [[0.01] * 4] * 3
    seconds = waited_for(exchanges(busy_s))

    for_ranks = seconds[1:, :-1].sum(axis=0)
    # Each of the others has to wait for some of the 90 ms.
    assert (seconds[1:, 0] > 0.05).all()
    assert for_ranks[0] == pytest.approx(for_ranks.sum(), abs=0.01)


def test_all_waiting_is_accounted_for() -> None:
    """What is not due to a rank is due to the message: the sum is the time waited."""
    rng = np.random.default_rng(0)
    for build in (gathers, exchanges):
        spans = build(rng.uniform(0.001, 0.1, (4, 20)).tolist(), 0.03)
        waited_s = [(s.transfers["end_s"] - s.transfers["wait_s"]).sum() for s in spans]
        np.testing.assert_allclose(waited_for(spans).sum(axis=1), waited_s, atol=1e-9)


def test_rank_that_sleeps_is_the_late_one_of_a_real_ring() -> None:
    """Rank 1 of three sleeps before the second round; it holds up both others, and only then."""

    def rounds(ring: Ring) -> StepSpans:
        recorder = SpanRecorder(CPU, 100)
        traced, start_s = TracedRing(ring, recorder), time.perf_counter()
        for turn in range(4):
            time.sleep(0.3 if (turn, ring.rank) == (1, 1) else 0.0)
            traced.exchange(torch.zeros(100_000), torch.empty(100_000)).wait()
            traced.all_gather(torch.zeros(10))
        return recorder.take(start_s, time.perf_counter())

    with ThreadRanks(3) as ranks:
        step = summary_of(tuple(ranks.run(rounds))).steps[0]

    assert step.late_rank == 1
    assert step.late_s > 0.2
    assert all(step.ranks[rank].waited_for_s[1] > 0.2 for rank in (0, 2))


def test_summary_names_late_rank_rates_and_skew() -> None:
    """Which rank is late, by how much, and what arrived at which rate."""
    summary = summary_of(gathers([[0.02, 0.02], [0.05, 0.03]]), gathers([[0.01], [0.01]]))

    step = summary.steps[0]
    assert step.late_rank == 1
    assert step.late_s == pytest.approx(0.04)
    assert step.layer_skew_s == pytest.approx((0.03, 0.01))
    assert step.started_s == pytest.approx((0.001, 0.001))
    waited = step.ranks[0]
    assert waited.waited_s == pytest.approx(0.042)
    assert waited.waited_for_s == pytest.approx((0.0, 0.04))
    assert waited.received_bytes == 2 * BYTES
    assert waited.received_bytes_per_s == pytest.approx(2 * BYTES / 0.042)
    assert summary.steps[1].late_rank is None
    assert summary.total.ranks[0].waited_for_s == pytest.approx((0.0, 0.04))
    assert summary.late_steps == {1: 1}
    assert "late: rank 1; another rank waited 40.00 ms for it" in summary.text()
    assert "rank 1 in 1 of 2 steps" in summary.text()
    json.dumps(dataclasses.asdict(summary))


def test_transfers_that_overlap_count_once() -> None:
    """Two messages at the same time are one time under way."""
    rank = SyntheticRank(0, 2)
    rank.now_s += 0.1
    rank.wait("exchange", 0, BEGAN_S, BEGAN_S + 0.2, 1)
    rank.wait("exchange", 0, BEGAN_S + 0.1, BEGAN_S + 0.3, 1)

    assert summary_of((rank.spans(), rank.spans())).steps[0].ranks[0].in_flight_s == (
        pytest.approx(0.3)
    )


def test_skew_of_a_burst_is_the_worst_of_its_passes() -> None:
    """A decode burst goes through all layers many times."""
    skews_s = ([0.0, 0.01], [0.02, 0.03])
    ranks = [SyntheticRank(rank, 2) for rank in range(2)]
    for start_s, of_pass in enumerate(skews_s):
        for rank in ranks:
            for layer, skew_s in enumerate(of_pass):
                rank.now_s = BEGAN_S + start_s + layer / 2 + rank.rank * skew_s
                rank.work(layer, 0.1)

    step = summary_of((ranks[0].spans(), ranks[1].spans())).steps[0]
    assert step.layer_skew_s == pytest.approx((0.02, 0.03))


def assert_valid_trace(trace: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Hold a trace against the trace event format; return its spans by the names of their rows."""
    events = trace["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {event["ph"] for event in events} == {"M", "X"}
    spans = [event for event in events if event["ph"] == "X"]
    assert [span["ts"] for span in spans] == sorted(span["ts"] for span in spans)
    by_row = defaultdict(list)
    for span in spans:
        assert {"ph", "ts", "dur", "pid", "tid", "name", "args"} <= span.keys()
        assert span["ts"] >= 0.0
        assert span["dur"] >= 0.0
        by_row[f"{processes[span['pid']]} {rows[span['pid'], span['tid']]}"].append(span)
    for row in by_row.values():
        # Spans of one row that overlap without one holding the other are drawn wrongly.
        for first, second in itertools.pairwise(row):
            end_us = first["ts"] + first["dur"]
            assert end_us <= second["ts"] + 0.01 or second["ts"] + second["dur"] <= end_us
    return by_row


def test_trace_is_valid_and_has_all_rows(tmp_path: Path) -> None:
    """A process for the coordinator and each rank, with steps, compute, sends and receives."""
    step = traced_step(exchanges([[0.1, 0.05]] * 2))
    clocks = (RankClock(1, 0.0, 0.0), RankClock(2, 5.0, 0.001))
    trace = Trace(hosts=("a", "b"), clocks=clocks, steps=(step,), is_cut=True)

    trace.write(tmp_path / "trace.json")

    rows = assert_valid_trace(json.loads((tmp_path / "trace.json").read_text()))
    ranks = [f"rank {n}" for n in ("0 (a)", "1 (b)")]
    kinds = ("steps", "compute", "send", "receive")
    assert rows.keys() == {"coordinator steps"} | {f"{r} {kind}" for r in ranks for kind in kinds}
    received = rows["rank 1 (b) receive"][0]
    assert received["name"] == "exchange"
    assert received["args"]["from"] == "rank 0"
    assert (received["args"]["layer"], received["args"]["bytes"]) == (0, BYTES)
    assert received["dur"] == pytest.approx(1e5)
    assert "the trace was full" in trace.summary().text()
    assert "agree within 1.00 ms" in trace.summary().text()


def test_messages_that_overlap_have_rows_of_their_own() -> None:
    """A viewer would draw one of them wrongly."""
    rank = SyntheticRank(0, 2)
    rank.now_s += 0.1
    rank.wait("exchange", 0, BEGAN_S, BEGAN_S + 0.2, 1)
    rank.wait("exchange", 0, BEGAN_S + 0.1, BEGAN_S + 0.3, 1)
    rank.wait("exchange", 0, BEGAN_S + 0.2, BEGAN_S + 0.4, 1)
    other = SyntheticRank(1, 2)
    rows = assert_valid_trace(chrome_trace("ab", [traced_step((rank.spans(), other.spans()))]))

    assert len(rows["rank 0 (a) receive"]) == 2
    assert len(rows["rank 0 (a) receive 2"]) == 1


def test_trace_without_steps_is_valid(tmp_path: Path) -> None:
    """Started and stopped with nothing between."""
    trace = Trace(hosts=("a",), clocks=(RankClock(1, 0.0, 0.0),), steps=(), is_cut=False)
    trace.write(tmp_path / "trace.json")

    assert trace.summary().text() == "no step was recorded"
    with pytest.raises(TraceError, match="cannot write the trace to"):
        trace.write(tmp_path)
