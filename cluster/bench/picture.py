"""A picture of a benchmark report; needs matplotlib (extra ``bench``)."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.bench.restore_picture import draw_cases
from cluster.bench.serve_picture import draw_loads
from models.errors import RingspanError

Axes = Any  # of matplotlib, which is imported only where a picture is drawn


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG.

    Raises:
        RingspanError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise RingspanError(
            "pictures need matplotlib: pip install 'ringspan[bench]', or leave --output out"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    machine = report["machine"]
    model = f": {report['model']}" if "model" in report else ""
    title = f"{report['benchmark']}{model}\n{machine['cpu']}, {machine['date']}"
    if report["kind"] == "restore":
        count = len(report["cases"])
        columns = min(count, 3)
        figure, panels = pyplot.subplots(
            -(-count // columns), columns, squeeze=False, figsize=(13, 9), layout="constrained"
        )
        draw_cases(report["cases"], panels.flat)
        figure.suptitle(title)
    elif report["kind"] == "serve":
        figure, panels = pyplot.subplots(1, 3, figsize=(14, 5), layout="constrained")
        draw_loads(report["loads"], panels)
        figure.suptitle(title)
    else:
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        _DRAWINGS[report["kind"]](report, axes)
        axes.set_title(title)
        axes.grid(visible=True, which="both", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=_COLUMNS.get(report["kind"], 4))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_lengths(report: dict[str, Any], axes: Axes) -> None:
    """Time over context length, a line for each contestant."""
    for name in dict.fromkeys(run["name"] for run in report["runs"]):
        runs = [run for run in report["runs"] if run["name"] == name]
        _draw_runs(axes, [run["tokens"] for run in runs], runs, name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("median, s (bars: fastest and slowest run)")


def _draw_conversation(report: dict[str, Any], axes: Axes) -> None:
    """Bars of each contestant over the cached tokens."""
    lengths = list(dict.fromkeys(run["tokens"] for run in report["runs"]))
    names = list(dict.fromkeys(run["name"] for run in report["runs"]))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        runs = [run for run in report["runs"] if run["name"] == name]
        places = [i + (index - (len(names) - 1) / 2) * width for i in range(len(runs))]
        times = [run["median_s"] for run in runs]
        bars = axes.bar(places, times, width, yerr=_spread(runs), capsize=3, label=name)
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_xlabel(f"tokens of the first turn, before {report['new_tokens']} new ones")
    axes.set_ylabel("median, s (lines: fastest and slowest run)")


def _draw_choice(report: dict[str, Any], axes: Axes) -> None:
    """Time over the miss rate for each algorithm, measured and predicted, and where they cross."""
    rows = sorted(report["rows"], key=lambda row: row["miss_percent"])
    miss = [row["miss_percent"] for row in rows]
    labels = {"pass_kv": "pass-KV", "pass_q": "pass-Q", "auto": "auto"}
    for rule, label in labels.items():
        runs = [row[rule] for row in rows]
        line = _draw_runs(axes, miss, runs, label)
        if rule != "auto":
            predicted = [statistics.median(run["predicted_s"]) for run in runs]
            color = line.lines[0].get_color()
            axes.plot(miss, predicted, "--", color=color, label=f"{label}, predicted")
    for percent in report["crossovers_percent"]:
        axes.axvline(percent, color="black", linestyle=":", label=f"crossover {percent:.3g} %")
    whole = [row for row in rows if row["auto"]["algorithm"] == "whole"]
    if whole:
        places = [row["miss_percent"] for row in whole]
        times = [row["auto"]["median_s"] for row in whole]
        axes.plot(places, times, "ks", fillstyle="none", markersize=12, label="whole on one rank")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(miss, [f"{percent:.3g}" for percent in miss])
    axes.minorticks_off()
    axes.set_xlabel(f"miss rate, % of {report['tokens']:,} tokens")
    axes.set_ylabel("median, s (bars: fastest and slowest run)")


def _draw_prediction(report: dict[str, Any], axes: Axes) -> None:
    """Predicted over measured seconds, a point for each step."""
    steps = report["steps"]
    for name, phase in dict.fromkeys((step["name"], step["phase"]) for step in steps):
        of = [step for step in steps if (step["name"], step["phase"]) == (name, phase)]
        measured = [step["slowest_rank_s"] for step in of]
        predicted = [step["predicted_s"] for step in of]
        axes.plot(measured, predicted, "o", markersize=4, alpha=0.6, label=f"{name}, {phase}")
    ends = [min(s["slowest_rank_s"] for s in steps), max(s["slowest_rank_s"] for s in steps)]
    axes.plot(ends, ends, "k-", linewidth=1, label="as predicted")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured on the slowest rank, s")
    axes.set_ylabel("predicted, s")


def _draw_requests(report: dict[str, Any], axes: Axes) -> None:
    """How many of the readers' waits were at most so long, a line for each that had streams."""
    runs = [run for run in report["latency"]["runs"] if "gaps" in run]
    for run in runs:
        waits_ms = sorted(gap_s * 1e3 for of in run["gaps"] for gap_s, _ in of)
        shares = [100 * (index + 1) / len(waits_ms) for index in range(len(waits_ms))]
        axes.step(waits_ms, shares, where="post", label=f"{run['cluster']}: {run['scene']}")
    target_ms = runs[0]["step_target_s"] * 1e3
    axes.axvline(target_ms, color="black", linestyle=":", label="step target")
    axes.set_xscale("log")
    axes.set_xlabel("a reader's wait between two deltas, ms")
    axes.set_ylabel("waits that were at most so long, %")


def _draw_kv(report: dict[str, Any], axes: Axes) -> None:
    """Bars of each tier's share of its yardstick, for each size of piece, and the goals."""
    shares = report["shares"]
    tiers = list(dict.fromkeys(share["of"] for share in shares))
    sizes = list(dict.fromkeys(share["size_mib"] for share in shares))
    width = 0.8 / len(sizes)
    for index, size_mib in enumerate(sizes):
        of_size = [share for share in shares if share["size_mib"] == size_mib]
        places = [i + (index - (len(sizes) - 1) / 2) * width for i in range(len(of_size))]
        bars = axes.bar(
            places, [share["median"] for share in of_size], width, label=f"pieces of {size_mib} MiB"
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    goals = [next(share for share in shares if share["of"] == tier) for tier in tiers]
    axes.hlines(
        [goal["goal"] for goal in goals],
        [i - 0.45 for i in range(len(goals))],
        [i + 0.45 for i in range(len(goals))],
        color="black",
        label="goal",
    )
    axes.set_xticks(range(len(goals)), [f"{goal['of']}\nof {goal['over']}" for goal in goals])
    axes.set_ylabel("share of the yardstick's bandwidth, median")


def _draw_runs(axes: Axes, places: list[float], runs: list[dict[str, Any]], label: str) -> Any:
    times = [run["median_s"] for run in runs]
    return axes.errorbar(places, times, yerr=_spread(runs), marker="o", capsize=3, label=label)


def _spread(runs: list[dict[str, Any]]) -> list[list[float]]:
    """From the median down to the fastest run, and up to the slowest."""
    down = [run["median_s"] - min(run["seconds"]) for run in runs]
    return [down, [max(run["seconds"]) - run["median_s"] for run in runs]]


_DRAWINGS: dict[str, Callable[[dict[str, Any], Axes], None]] = {
    "prefill": _draw_lengths,
    "offload": _draw_lengths,
    "decode": _draw_lengths,
    "conversation": _draw_conversation,
    "choice": _draw_choice,
    "prediction": _draw_prediction,
    "requests": _draw_requests,
    "kv": _draw_kv,
}
_COLUMNS = {"requests": 2}  # of the legend
