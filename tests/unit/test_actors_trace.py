"""What the coordinator keeps of a trace, with ranks that only answer."""

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from actors.cluster_info import ClusterInfo
from actors.errors import RankLost, TraceError
from actors.messages import StepResult
from actors.trace import MAX_SPANS, Tracer
from attention.clocks import RankClock, boot_id
from attention.spans import StepSpans
from tests.unit.test_actors_timeline import BEGAN_S, gathers, traced_step

INFO = ClusterInfo(
    model="m",
    num_ranks=2,
    hosts=("a", "b"),
    workers=(),
    max_model_len=1,
    kv_capacity_tokens=1,
    has_tokenizer=False,
)
AHEAD_S = 1000.0  # rank 1's clock, before rank 0's


class AnsweringRanks:
    """Two ranks of two hosts; rank 0 shares the coordinator's."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.is_lost = False

    async def call(self, method: str, *args: Any, timeout_s: float | None) -> list[Any]:
        self.calls.append((method, *args))
        if self.is_lost:
            raise RankLost("rank 1 died")
        return [RankClock(boot_id(), 0.0, 0.0), RankClock(1, AHEAD_S, 0.001)]


def results(spans: tuple[StepSpans | None, ...]) -> list[StepResult]:
    return [
        StepResult(rank=rank, number=0, sequences=(), wall_s=1.0, parts_s={}, spans=of_rank)
        for rank, of_rank in enumerate(spans)
    ]


def as_recorded_on_rank_1(spans: StepSpans) -> StepSpans:
    parts, transfers = spans.parts.copy(), spans.transfers.copy()
    for rows in (parts, transfers):
        for name in rows.dtype.names or ():
            if name.endswith("_s"):
                rows[name] += AHEAD_S
    start_s, end_s = spans.start_s + AHEAD_S, spans.end_s + AHEAD_S
    return StepSpans(spans.part_names, parts, transfers, start_s, end_s, is_cut=False)


def test_spans_of_all_ranks_are_put_on_one_clock() -> None:
    """Rank 1's clock is far ahead; in the trace both worked at the same time."""
    ranks, tracer = AnsweringRanks(), Tracer()
    spans = gathers([[0.01], [0.03]])
    record = traced_step(spans).record

    asyncio.run(tracer.start(ranks, 2))  # type: ignore[arg-type]
    tracer.add(BEGAN_S, record, results((spans[0], as_recorded_on_rank_1(spans[1]))))
    trace = asyncio.run(tracer.stop(ranks, INFO))  # type: ignore[arg-type]

    moved = trace.steps[0].spans[1]
    np.testing.assert_allclose(moved.parts["end_s"], spans[1].parts["end_s"])
    np.testing.assert_allclose(moved.transfers["wait_s"], spans[1].transfers["wait_s"])
    assert moved.start_s == pytest.approx(BEGAN_S)
    assert trace.summary().steps[0].late_rank == 1
    assert trace.summary().clock_error_s == 0.001
    assert ranks.calls == [("start_trace", MAX_SPANS // 2), ("stop_trace",)]


def test_only_whole_steps_between_start_and_the_limit_are_kept() -> None:
    """Steps under way at the start have no spans, and after the limit nothing is kept."""
    ranks, tracer = AnsweringRanks(), Tracer()
    spans = gathers([[0.01], [0.03]])
    full = dataclasses.replace(spans[0], is_cut=True)
    record = traced_step(spans).record

    tracer.add(BEGAN_S, record, results(spans))
    asyncio.run(tracer.start(ranks, 2))  # type: ignore[arg-type]
    tracer.add(BEGAN_S, record, results((None, spans[1])))
    tracer.add(BEGAN_S, record, results(spans))
    tracer.add(BEGAN_S, record, results((full, spans[1])))
    tracer.add(BEGAN_S, record, results(spans))
    trace = asyncio.run(tracer.stop(ranks, INFO))  # type: ignore[arg-type]

    assert len(trace.steps) == 2
    assert trace.is_cut


def test_lost_rank_does_not_lose_the_trace() -> None:
    """What happened before is what one wants to see then; and a start that failed is none."""
    ranks, tracer = AnsweringRanks(), Tracer()
    spans = gathers([[0.01], [0.03]])
    asyncio.run(tracer.start(ranks, 2))  # type: ignore[arg-type]
    tracer.add(BEGAN_S, traced_step(spans).record, results(spans))
    ranks.is_lost = True

    assert len(asyncio.run(tracer.stop(ranks, INFO)).steps) == 1  # type: ignore[arg-type]
    with pytest.raises(RankLost):
        asyncio.run(tracer.start(ranks, 2))  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="no trace is being recorded"):
        asyncio.run(tracer.stop(ranks, INFO))  # type: ignore[arg-type]
