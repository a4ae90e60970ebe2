"""What steps, answers and restores add up to."""

import time
from dataclasses import replace
from typing import Any

from actors.counts import Counts
from actors.records import Restored, StepRecord

STEP = StepRecord(
    number=1,
    phase="decode",
    sequence_ids=(1, 2),
    prefill_tokens=0,
    decode_tokens=4,
    cached_tokens=100,
    algorithm="all_gather",
    num_ranks=2,
    predicted_s=None,
    prices_s={},
    plan_s=0.0,
    wall_s=0.03,
    ranks_wall_s=(0.02, 0.03),
    ranks_parts_s=({"gemm": 0.01, "exchange": 0.25}, {"gemm": 0.02}),
)
BACK = Restored(
    tokens=300,
    tokens_by_tier={"host": 100, "remote": 200},
    find_s=0.0,
    stage_s=0.0,
    copy_s=0.0,
    recomputed_tokens=50,
    link_bytes=3000,
)


def test_steps_are_told_by_kind_and_rank() -> None:
    """Each phase and algorithm has a histogram of its own; parts add up on each rank."""
    counts = Counts()
    counts.add_step(STEP)
    counts.add_step(replace(STEP, wall_s=1e9))
    counts.add_step(replace(STEP, phase="prefill", algorithm="pass_q", prefill_tokens=512))

    told = counts.told()

    decode, prefill = told["steps"]
    assert (decode["phase"], decode["algorithm"]) == ("decode", "all_gather")
    assert sum(decode["seconds"]["counts"]) == 2
    assert decode["seconds"]["counts"][-1] == 1  # beyond the last end
    assert len(decode["seconds"]["counts"]) == len(decode["seconds"]["ends"]) + 1
    assert (prefill["phase"], prefill["seconds"]["sum"]) == ("prefill", 0.03)
    assert told["step_tokens"]["sum"] == 4 + 4 + 516
    assert told["rank_parts_s"] == [{"gemm": 0.03, "exchange": 0.75}, {"gemm": 0.06}]


def test_prompts_are_told_by_where_they_were() -> None:
    """What was restored was not found on the device; the rest of the cached tokens was."""
    counts = Counts()
    counts.add_answer(1000, 340, [BACK])
    counts.add_answer(10, 0, [])
    counts.add_restored(BACK)
    counts.add_decision("load")
    counts.add_decision("load")

    told: dict[str, Any] = counts.told()

    assert told["prompt_tokens"] == 1010
    assert told["cached_tokens"] == {"device": 40, "host": 100, "remote": 200}
    assert told["restored_bytes"] == {"host": 1000, "remote": 2000}
    assert (told["recomputed_tokens"], told["decisions"]) == (50, {"load": 2})


def test_a_step_costs_microseconds() -> None:
    """Steps of a small model take milliseconds: counting must not show."""
    counts = Counts()
    begin_s = time.perf_counter()
    for _ in range(1000):
        counts.add_step(STEP)
    assert (time.perf_counter() - begin_s) / 1000 < 200e-6
