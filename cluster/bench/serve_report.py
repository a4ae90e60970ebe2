"""What samples of a served load come to: percentiles, throughput, goodput; and their table."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cluster.bench.runs import heading
from cluster.bench.serve_load import Sample
from models.errors import PromptError

PERCENTILES = (50, 95, 99)
GOALS = ("ttft", "tpot", "itl", "e2el")  # as `--goodput` names them


def read_goodput(text: str) -> dict[str, float]:
    """Return goals in seconds by name, of ``ttft:MS,itl:MS``.

    Raises:
        PromptError: A goal has no such name, or no limit > 0.
    """
    goals: dict[str, float] = {}
    for word in text.split(","):
        name, _, limit = word.strip().partition(":")
        try:
            goals[name] = float(limit) / 1e3
        except ValueError:
            goals[name] = 0.0
        if name not in GOALS or not 0 < goals[name] < float("inf"):
            raise PromptError(
                f"--goodput must be like ttft:500,itl:50 in ms, of {', '.join(GOALS)}, got {text!r}"
            )
    return goals


def meets(sample: Sample, goals: Mapping[str, float]) -> bool:
    """Return whether a request was answered within all goals; itl is the p95 of its own gaps."""
    if sample.error is not None:
        return False
    gaps_s = sample.gaps_s
    told = {
        "ttft": sample.ttft_s,
        "e2el": sample.e2el_s,
        "tpot": sample.tpot_s or 0.0,
        "itl": float(np.percentile(gaps_s, 95)) if gaps_s else 0.0,
    }
    return all(told[name] <= limit_s for name, limit_s in goals.items())


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return p50, p95 and p99; None of nothing."""
    if not values:
        return None
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}


def load_entry(
    door: str, rate: float, samples: Sequence[Sample], goals: Mapping[str, float]
) -> dict[str, Any]:
    """Return one load as plain values; latencies are of the requests without error."""
    good = [sample for sample in samples if sample.error is None]
    begin_s = min(sample.planned_s for sample in samples)
    end_s = max((sample.arrivals[-1][0] for sample in good), default=begin_s)
    span_s = max(end_s - begin_s, 1e-9)
    met = sum(meets(sample, goals) for sample in samples)
    errors = [sample.error for sample in samples if sample.error is not None]
    return {
        "door": door,
        "request_rate": "inf" if rate == float("inf") else rate,
        "requests": len(samples),
        "errors": len(errors),
        "first_errors": errors[:3],
        "seconds": span_s,
        "requests_per_s": len(good) / span_s,
        "tokens_per_s": sum(len(sample.token_ids) for sample in good) / span_s,
        "goodput_share": met / len(samples),
        "goodput_requests_per_s": met / span_s,
        "ttft_s": percentiles([sample.ttft_s for sample in good]),
        "tpot_s": percentiles([tpot for s in good if (tpot := s.tpot_s) is not None]),
        "itl_s": percentiles([gap_s for sample in good for gap_s in sample.gaps_s]),
        "e2el_s": percentiles([sample.e2el_s for sample in good]),
        # How far the load generator itself was behind its plan.
        "sent_late_s": percentiles([sample.sent_s - sample.planned_s for sample in samples]),
    }


def cost_entry(tokens: int, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the doors' times at idle, and medians of paired differences from the handle's.

    Servers that ran already have no handle here, and no differences.
    """
    return {
        "answer_tokens": tokens,
        "seconds": {door: list(of) for door, of in seconds.items()},
        "median_s": {door: statistics.median(of) for door, of in seconds.items()},
        "over_handle_s": {
            door: statistics.median(a - b for a, b in zip(of, seconds["handle"], strict=True))
            for door, of in seconds.items()
            if door != "handle" and "handle" in seconds
        },
    }


def table(report: dict[str, Any]) -> str:
    """Return a report as text."""
    return "\n".join([heading(report), "", *_lines(report)])


def _lines(report: dict[str, Any]) -> Iterator[str]:
    goals = ", ".join(f"{name} {s * 1e3:.1f} ms" for name, s in report["goodput"].items())
    yield f"latencies from the planned arrival, ms p50/p95/p99; goodput within {goals}"
    yield (
        f"{'door':8}{'rate':>7}{'TTFT':>22}{'TPOT':>19}{'ITL':>19}{'E2EL':>25}"
        f"{'tok/s':>9}{'req/s':>8}{'good':>6}{'errors':>8}"
    )
    for run in report["loads"]:
        rate = run["request_rate"]
        yield (
            f"{run['door']:8}{rate if rate == 'inf' else format(rate, '.3g'):>7}"
            f"{_ms(run['ttft_s']):>22}{_ms(run['tpot_s']):>19}{_ms(run['itl_s']):>19}"
            f"{_ms(run['e2el_s']):>25}{run['tokens_per_s']:>9.1f}{run['requests_per_s']:>8.2f}"
            f"{run['goodput_share']:>6.0%}{run['errors']:>8}"
        )
    for cost in report["idle"]:
        medians = ", ".join(f"{d} {s * 1e3:.2f} ms" for d, s in cost["median_s"].items())
        over = ", ".join(f"{d} {s * 1e3:+.2f} ms" for d, s in cost["over_handle_s"].items())
        paired = f"; over the handle (paired): {over}" if over else ""  # of our own server only
        yield f"idle, {cost['answer_tokens']} tokens: {medians}{paired}"
    for many in report["concurrent"]:
        yield (
            f"{many['streams']} streams at once, {many['door']}: {many['errors']} errors,"
            f" {many['same']} of {many['compared']} as alone, {many['seconds']:.2f} s"
        )


def _ms(of: Mapping[str, float] | None) -> str:
    return "-" if of is None else "/".join(f"{s * 1e3:.1f}" for s in of.values())
