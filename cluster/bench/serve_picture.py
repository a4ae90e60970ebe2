"""A picture of a served load: TTFT, ITL and goodput over the request rate, a line a door."""

from collections.abc import Sequence
from typing import Any

PANELS = (
    ("ttft_s", "time to first token, ms (p50, dashed: p95)"),
    ("itl_s", "between pieces, ms (p50, dashed: p95)"),
)


def draw_loads(loads: Sequence[dict[str, Any]], panels: Sequence[Any]) -> None:
    """Draw into three axes; the rate ``inf`` is the last place."""
    rates = list(dict.fromkeys(run["request_rate"] for run in loads))
    for door in dict.fromkeys(run["door"] for run in loads):
        runs = [run for run in loads if run["door"] == door]
        places = [rates.index(run["request_rate"]) for run in runs]
        share = [100 * run["goodput_share"] for run in runs]
        (line,) = panels[2].plot(places, share, "o-", label=door)
        for axes, (key, _) in zip(panels, PANELS, strict=False):
            for percent, style in (("p50", "o-"), ("p95", "o--")):
                ms = [run[key][percent] * 1e3 if run[key] else float("nan") for run in runs]
                axes.plot(places, ms, style, color=line.get_color(), markersize=4)
    for axes, (_, label) in zip(panels, PANELS, strict=False):
        axes.set_yscale("log")
        axes.set_ylabel(label)
    panels[2].set_ylabel("requests within the goals, %")
    for axes in panels:
        axes.set_xticks(range(len(rates)), [str(rate) for rate in rates])
        axes.set_xlabel("planned requests/s")
        axes.grid(visible=True, alpha=0.3)
