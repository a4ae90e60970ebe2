"""Time outside the model, for each decode step: what planning, Ray and a rank's own code take.

Pure functions of step records. The parts of a step, one after another:
*plan*, the coordinator decides what comes next; *ray*, its plan travels to the ranks and
their results back, and are taken in; *other*, what the slowest rank spends in none of
its timed parts. A burst's are divided by its decode steps.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from actors.records import Phase, StepRecord
from cluster.bench.runs import Measured

STEP_S = 0.020  # of a larger model on a GPU, for comparison
PARTS = ("plan", "ray", "other")


def decode_steps(step: StepRecord) -> int | None:
    """Return how many decode steps each row of a step took; None where rows took several counts.

    A row that is beside a prompt takes one. In a burst a record knows the sum over rows only.
    """
    if step.phase == "mixed":
        return 1
    steps, rest = divmod(step.decode_tokens, len(step.sequence_ids))
    return None if rest or not steps else steps


def parts_s(step: StepRecord) -> dict[str, float]:
    """Return what a step took outside the model, in seconds by part."""
    slowest_s = max(step.ranks_wall_s)
    timed_s = step.ranks_parts_s[step.ranks_wall_s.index(slowest_s)]
    return {
        "plan": step.plan_s,
        "ray": step.wall_s - slowest_s,
        "other": slowest_s - sum(timed_s.values()),
    }


def phase_entry(phase: Phase, steps: Sequence[StepRecord]) -> dict[str, Any] | None:
    """Return medians over the steps of one phase for each decode step, or None without any."""
    counted = [
        (step, count)
        for step in steps
        if step.phase == phase and (count := decode_steps(step)) is not None
    ]
    if not counted:
        return None
    by_step = [
        {part: seconds / count for part, seconds in parts_s(step).items()}
        for step, count in counted
    ]
    totals_s = [sum(each.values()) for each in by_step]
    median_s = statistics.median(totals_s)
    return {
        "phase": phase,
        "plans": len(counted),
        "decode_steps": sum(count for _, count in counted),
        "step_s": statistics.median((step.plan_s + step.wall_s) / n for step, n in counted),
        "parts_us": {part: statistics.median(e[part] for e in by_step) * 1e6 for part in PARTS},
        "total_us": median_s * 1e6,
        "total_p95_us": float(np.percentile(totals_s, 95)) * 1e6,
        "share_of_20_ms": median_s / STEP_S,
    }


def in_no_step_us(runs: Sequence[Measured]) -> float:
    """Return what is left of a run for each plan: the caller, and the loop between steps."""
    return 1e6 * statistics.median(
        (run.seconds - sum(step.plan_s + step.wall_s for step in run.steps)) / len(run.steps)
        for run in runs
    )


def report(bursts: Sequence[Measured], mixed: Sequence[StepRecord]) -> dict[str, Any]:
    """Return the parts of bursts, of runs whose requests came together, and of mixed steps."""
    burst_steps = [step for run in bursts for step in run.steps]
    entries = [phase_entry("decode", burst_steps), phase_entry("mixed", mixed)]
    return {
        "phases": [entry for entry in entries if entry is not None],
        "in_no_step_us": in_no_step_us(bursts),
    }


def lines(outside: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report as text."""
    yield "outside the model, for each decode step: medians"
    yield (
        f"{'':8}{'plans':>7}{'steps':>7}{'step ms':>9}"
        + "".join(f"{part + ' us':>10}" for part in PARTS)
        + f"{'all us':>10}{'p95':>9}{'of 20 ms':>10}"
    )
    for each in outside["phases"]:
        yield (
            f"{each['phase']:8}{each['plans']:>7}{each['decode_steps']:>7}"
            f"{each['step_s'] * 1e3:>9.2f}"
            + "".join(f"{each['parts_us'][part]:>10.0f}" for part in PARTS)
            + f"{each['total_us']:>10.0f}{each['total_p95_us']:>9.0f}"
            + f"{each['share_of_20_ms']:>10.2%}"
        )
    yield (
        f"and in no step {outside['in_no_step_us']:.0f} us for each plan: the caller, and the"
        " coordinator's loop between steps"
    )
