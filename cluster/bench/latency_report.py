"""What readers of streamed answers waited for, with and without a long prompt beside them.

Pure functions of the moments at which deltas came. A delta is what a step, or a burst of
decode steps, adds to an answer, so a *gap* between two of them is what a reader waits;
the time per token divides all gaps by the tokens that ended them.
"""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.errors import ClusterError
from actors.records import StepRecord

Arrivals = tuple[tuple[float, int], ...]  # of one answer's deltas: the moment, and its tokens
Gap = tuple[float, int]  # seconds before a delta, and the delta's tokens
Place = tuple[str, str]  # a cluster, and what it was asked for

RIDES, TURNS = "decode rides", "decode takes turns"
STREAMS, BOTH, LONG = "streams alone", "streams and long prompt", "long prompt alone"
WHAT = {"p95_s": "gap, p95", "per_token_s": "time per token", "long_s": "long prompt"}
COMPARED: list[tuple[str, Place, Place]] = [
    *(
        (key, of, over)
        for key in ("p95_s", "per_token_s")
        for of, over in (
            ((RIDES, BOTH), (RIDES, STREAMS)),
            ((TURNS, BOTH), (TURNS, STREAMS)),
            ((TURNS, BOTH), (RIDES, BOTH)),
        )
    ),
    ("long_s", (RIDES, BOTH), (RIDES, LONG)),
    ("long_s", (TURNS, BOTH), (TURNS, LONG)),
    ("long_s", (TURNS, BOTH), (RIDES, BOTH)),
]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One run, by the clock of the process that asked."""

    arrivals: tuple[Arrivals, ...] = ()  # of each streamed answer
    long_span_s: tuple[float, float] | None = None  # the long prompt: handed in, answered
    steps: tuple[StepRecord, ...] = ()  # that the long prompt was in


def gaps(scene: Scene) -> list[Gap]:
    """Return the gaps of all streams; beside a long prompt those that it had a part in.

    Raises:
        ClusterError: There is none: the streams had ended before the long prompt came.
    """
    begin_s, end_s = scene.long_span_s or (float("-inf"), float("inf"))
    found = [
        (after_s - before_s, tokens)
        for arrivals in scene.arrivals
        for (before_s, _), (after_s, tokens) in itertools.pairwise(arrivals)
        if after_s > begin_s and before_s < end_s
    ]
    if not found:
        raise ClusterError(
            "no stream waited beside the long prompt, or each came in one piece: ask for longer"
            " answers (--answer) or a longer prompt (--long)"
        )
    return found


def overlap(scene: Scene) -> float:
    """Return the share of the long prompt's time in which a stream was under way."""
    assert scene.long_span_s is not None
    begin_s, end_s = scene.long_span_s
    last_s = max(arrivals[-1][0] for arrivals in scene.arrivals)
    return min(1.0, (last_s - begin_s) / (end_s - begin_s))


def run_entry(place: Place, step_target_s: float, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Return the runs of one cluster at one thing as plain values, a value for each run."""
    entry: dict[str, Any] = {"cluster": place[0], "scene": place[1], "step_target_s": step_target_s}
    if place[1] != LONG:
        found = [gaps(scene) for scene in scenes]
        entry["gaps"] = found
        waits_s = [[gap_s for gap_s, _ in of] for of in found]
        for name, percent in (("p50_s", 50), ("p95_s", 95), ("max_s", 100)):
            entry[name] = [float(np.percentile(of, percent)) for of in waits_s]
        entry["per_token_s"] = [
            sum(gap_s for gap_s, _ in of) / sum(tokens for _, tokens in of) for of in found
        ]
        entry["p95_over_target"] = statistics.median(entry["p95_s"]) / step_target_s
    if place[1] != STREAMS:
        spans = [scene.long_span_s for scene in scenes if scene.long_span_s is not None]
        entry["long_s"] = [end_s - begin_s for begin_s, end_s in spans]
    if place[1] == BOTH:
        entry["overlap"] = [overlap(scene) for scene in scenes]
    return entry


def ratios(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return medians of paired ratios: run i at one place over run i at another."""
    by_place = {(run["cluster"], run["scene"]): run for run in runs}
    return [
        {
            "what": key,
            "of": ": ".join(of),
            "over": ": ".join(over),
            "median": statistics.median(
                a / b for a, b in zip(by_place[of][key], by_place[over][key], strict=True)
            ),
        }
        for key, of, over in COMPARED
    ]


def lines(latency: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report as text."""
    yield (
        f"time between tokens: {latency['streams']} streams of {latency['prompt']} +"
        f" {latency['answer']} tokens, a long prompt of {latency['long']}, N={latency['ranks']},"
        f" step target {latency['runs'][0]['step_target_s'] * 1e3:.1f} ms; medians of runs"
    )
    yield (
        f"{'':46}{'gap ms: p50':>12}{'p95':>9}{'max':>9}{'p95/target':>12}{'ms/token':>10}"
        f"{'long s':>9}{'overlap':>9}"
    )
    for run in latency["runs"]:
        yield _line(run)
    yield "medians of paired ratios:"
    for each in latency["ratios"]:
        of = f"({each['of']}) / ({each['over']})"
        yield f"{WHAT[each['what']]:>16}  {of} = {each['median']:.3f}"


def _line(run: Mapping[str, Any]) -> str:
    text = f"{run['cluster']}: {run['scene']}"
    text = f"{text:46}"
    for key, width in (("p50_s", 12), ("p95_s", 9), ("max_s", 9)):
        text += _cell(run, key, 1e3, width, ".1f")
    text += f"{run['p95_over_target']:>12.2f}" if "p95_over_target" in run else f"{'':12}"
    text += _cell(run, "per_token_s", 1e3, 10, ".2f")
    text += _cell(run, "long_s", 1.0, 9, ".3f")
    return (text + _cell(run, "overlap", 1.0, 9, ".0%")).rstrip()


def _cell(run: Mapping[str, Any], key: str, scale: float, width: int, form: str) -> str:
    value = format(statistics.median(run[key]) * scale, form) if key in run else ""
    return f"{value:>{width}}"
