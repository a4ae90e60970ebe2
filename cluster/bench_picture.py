"""A picture of a benchmark report; needs matplotlib (extra ``bench``)."""

from pathlib import Path
from typing import Any

from models.errors import RingspanError


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG: time over context length, a line for each contestant.

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

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(run["name"] for run in report["runs"]):
        runs = [run for run in report["runs"] if run["name"] == name]
        times = [run["median_s"] for run in runs]
        spread = [
            [run["median_s"] - min(run["seconds"]) for run in runs],
            [max(run["seconds"]) - run["median_s"] for run in runs],
        ]
        tokens = [run["tokens"] for run in runs]
        axes.errorbar(tokens, times, yerr=spread, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("median, s (bars: fastest and slowest run)")
    machine = report["machine"]
    axes.set_title(f"{report['benchmark']}: {report['model']}\n{machine['cpu']}, {machine['date']}")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
