"""Time against split for each case of ``ringspan bench restore``."""

from collections.abc import Iterable, Sequence
from typing import Any

from cluster.bench.restore_report import link_text

COLORS = {"projected": "tab:blue", "recomputed": "tab:orange"}
LABELS = {"projected": "as layer inputs", "recomputed": "recomputed from ids"}


def draw_cases(cases: Sequence[dict[str, Any]], panels: Iterable[Any]) -> None:
    """Draw one panel for each case: points are measured, lines are predicted."""
    panels = list(panels)
    for case, axes in zip(cases, panels, strict=False):
        _draw_case(case, axes, is_labelled=case is cases[0])
    for axes in panels[len(cases) :]:
        axes.set_visible(False)


def _draw_case(case: dict[str, Any], axes: Any, *, is_labelled: bool) -> None:
    def label(text: str) -> str | None:
        return text if is_labelled else None

    for kind, line in case["lines"].items():
        axes.plot(
            *zip(*line, strict=True), color=COLORS[kind], label=label(f"{LABELS[kind]}, predicted")
        )
        splits = [s for s in case["splits"] if (kind == "recomputed") == (s["recomputed"] > 0)]
        places = [split[kind] for split in splits]
        medians = [split["median_s"] for split in splits]
        spread = [
            [s["median_s"] - min(s["seconds"]) for s in splits],
            [max(s["seconds"]) - s["median_s"] for s in splits],
        ]
        axes.errorbar(
            places,
            medians,
            yerr=spread,
            fmt="o",
            capsize=3,
            color=COLORS[kind],
            label=label(f"{LABELS[kind]}, measured"),
        )
    _mark(axes, case["found"], case["found"]["median_s"], "k*", label("best found"))
    _mark(axes, case["plan"], case["plan"]["predicted_s"], "rD", label("planned, predicted"))
    joint = next(run for run in case["runs"] if run["name"] == "joint LP")
    axes.axhline(joint["median_s"], color="red", linestyle=":", label=label("planned, measured"))
    axes.set_ylim(bottom=0)
    axes.set_title(f"{case['shape']}: {link_text(case)}", fontsize=9)
    axes.set_xlabel(f"of {case['tokens']:,} tokens, those not loaded as KV", fontsize=8)
    axes.set_ylabel("to the first token, s (bars: fastest and slowest)", fontsize=8)
    axes.grid(visible=True, alpha=0.3)


def _mark(axes: Any, split: dict[str, Any], seconds: float, form: str, label: str | None) -> None:
    """Mark a split over what it recomputes, or where that is nothing over what it projects."""
    place = split["recomputed"] or split["projected"]
    axes.plot([place], [seconds], form, markersize=10, fillstyle="none", label=label)
